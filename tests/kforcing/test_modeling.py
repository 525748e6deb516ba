import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from kforcing import Design, NoiseConfig, PushForwardConfig, PushForwardLM
from kforcing.attention.windows import Windows
from kforcing.distillation.teachers import StudentTeacher
from tests.models import VOCAB, make_backbone


def inputs(B=2, N=7, K=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (B, N), generator=g), torch.rand(B, K, generator=g, dtype=torch.float64)


def test_forward_gives_one_distribution_a_noise_variable(student):
    context, noise = inputs()
    logits = student(context, noise)
    assert logits.shape == (2, 4, VOCAB)
    assert logits.dtype == torch.float32


def test_hints_are_causal_so_a_smaller_k_is_a_prefix(student):
    context, noise = inputs()
    whole = student(context, noise)
    for k in (1, 2, 3):
        torch.testing.assert_close(student(context, noise[:, :k]), whole[:, :k], rtol=1e-4, atol=1e-4)
    changed = noise.clone()
    changed[:, 2] = 1 - changed[:, 2]
    after = student(context, changed)
    torch.testing.assert_close(after[:, :2], whole[:, :2])
    assert not torch.allclose(after[:, 2], whole[:, 2])
    assert not torch.allclose(after[:, 3], whole[:, 3])


def test_windows_equal_single_contexts(student):
    context, noise = inputs(N=9)
    anchors = torch.tensor([[2, 8], [5, 0]])
    noise = torch.rand(2, 2, 4, dtype=torch.float64)
    logits = student.draw(Windows(context, anchors, noise, torch.ones(2))).logits_BWKV
    for b in range(2):
        for w in range(2):
            alone = student(context[b : b + 1, : anchors[b, w] + 1], noise[b : b + 1, w])[0]
            torch.testing.assert_close(logits[b, w], alone, rtol=1e-4, atol=1e-4)


def test_committed_tokens_between_context_and_hints_are_context(student):
    """The second teacher pass of self-forcing equals a plain pass over the longer context."""
    context, noise = inputs(N=6)
    prefix = torch.randint(0, VOCAB, (2, 1, 3))
    windows = Windows(context, torch.full((2, 1), 5), noise[:, None], torch.ones(2), prefix)
    logits = student.draw(windows).logits_BWKV[:, 0]
    torch.testing.assert_close(logits, student(torch.cat([context, prefix[:, 0]], 1), noise), rtol=1e-4, atol=1e-4)


def test_two_passes_of_a_student_are_its_generation(student):
    context, _ = inputs(B=1)
    tokens = student.continue_prompts(context, k=2, max_new_tokens=4, seed=3)[0]
    from kforcing.keys import derive_key
    from kforcing.noise import uniform

    z = uniform(derive_key(3, "decode"), torch.zeros(1, dtype=torch.int64), 0, torch.arange(7, 11))
    windows = Windows(context, torch.tensor([[6]]), z[None, None], torch.ones(1))
    rolled = StudentTeacher(student, k=2).rollout(windows)
    assert rolled[0, 0].tolist() == tokens


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_saving_and_loading_is_exact(tmp_path, name):
    student = PushForwardLM.from_backbone(
        make_backbone(name), k=3, design=Design(noise=NoiseConfig(0.5, 9.0, 0.7, 1.3))
    )
    student.save_pretrained(tmp_path)
    assert {f.name for f in tmp_path.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}
    again = PushForwardLM.from_pretrained(tmp_path)
    assert again.config.k == 3
    assert again.config.design.noise == NoiseConfig(0.5, 9.0, 0.7, 1.3)
    context, noise = inputs(K=3)
    assert torch.equal(again(context, noise), student(context, noise))


def test_missing_and_unexpected_weights_are_errors(tmp_path, student):
    student.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    removed = dict(weights)
    removed.pop("readout.noise_encoder.norm.weight")
    save_file(removed, tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match=r"noise_encoder\.norm\.weight"):
        PushForwardLM.from_pretrained(tmp_path)
    save_file(weights | {"surprise": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match="surprise"):
        PushForwardLM.from_pretrained(tmp_path)


def test_a_folder_that_is_not_a_student_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json in"):
        PushForwardLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="does not describe a PushForwardLM"):
        PushForwardLM.from_pretrained(tmp_path)


def test_generation_repeats_and_does_not_depend_on_the_batch(student):
    prompts, _ = inputs(B=3)
    together = student.continue_prompts(prompts, max_new_tokens=10, seed=5)
    assert together == student.continue_prompts(prompts, max_new_tokens=10, seed=5)
    assert together[1] == student.continue_prompts(prompts[1], max_new_tokens=10, seed=5)[0]
    assert together != student.continue_prompts(prompts, max_new_tokens=10, seed=6)
    assert all(len(row) == 10 for row in together)


def test_generation_ends_before_eos_inside_a_block(student):
    prompts, _ = inputs(B=1)
    row = student.continue_prompts(prompts, max_new_tokens=12, seed=0)[0]
    eos = row[5]
    cut = student.continue_prompts(prompts, max_new_tokens=12, seed=0, eos_token_id=eos)[0]
    assert cut == row[: row.index(eos)]


def test_every_backbone_generates(backbone):
    prompts, _ = inputs(B=2)
    student = PushForwardLM.from_backbone(backbone, k=2).eval()
    assert all(len(row) == 5 for row in student.continue_prompts(prompts, max_new_tokens=5))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s(*inputs(K=5)), "k=5 tokens asked of a student of k=4"),
        (lambda s: s(inputs()[0], torch.rand(3, 4)), "expected context_ids"),
        (lambda s: s.continue_prompts(inputs()[0], k=5, max_new_tokens=2), "k=5 tokens a step asked where 1 to 4"),
        (lambda s: s.continue_prompts(inputs()[0], max_new_tokens=0), "max_new_tokens=0 must be at least 1"),
        (lambda s: s.continue_prompts(inputs()[0], max_new_tokens=60), "the model reads 64 positions"),
        (lambda s: s.continue_prompts(inputs()[0], max_new_tokens=4, temperature=0.5), "trained for 1.0 to 1.0"),
        (lambda s: PushForwardConfig(0, {}), "k must be at least 1"),
        (lambda s: PushForwardConfig(1, {}, Design(noise=NoiseConfig(2.0, 1.0))), "0 < min < max"),
        (lambda s: PushForwardConfig(1, {}, Design(noise=NoiseConfig(temperature_min=0.0))), "0 < min ≤ max"),
    ],
)
def test_bad_calls_name_the_value(student, call, message):
    with pytest.raises(ValueError, match=message):
        call(student)


def test_new_hints_have_the_scale_of_token_embeddings(student):
    z = torch.rand(500)
    with torch.no_grad():
        hints = student.readout.noise_encoder(z, torch.ones_like(z))
    assert hints.std() == pytest.approx(student.backbone.get_input_embeddings().weight.std().item(), rel=0.3)
