"""Training on text, saving, loading and exact mode for tiny random models of five families, as the recipes `hf` and
`quickstart` treat a given model."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from kforcing import Design, PushForwardLM, SequentialConfig
from kforcing.backbone import load_ar
from kforcing.distillation.text import TextBatch
from kforcing.engine import Engine, EngineConfig, Request, SamplingParams
from kforcing.noise import window_noise
from pipelines.training.initial_model import Wrapped

VOCAB, ROWS, N, K = 64, 8, 48, 4
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "gpt2": GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=128),
}


def trained(folder, steps=40):
    """The loss of each step, and the student of the model in a folder."""
    design = Design("sequential", "gumbel", sequential=SequentialConfig(hint_layers=1))
    step = Wrapped(str(folder), K, design, "kl", seed=0).build().eval()  # no dropout, as in a train worker
    backbone = step.model.backbone
    text = torch.full((ROWS, 1), 1)
    text = backbone.generate(text, do_sample=True, max_new_tokens=N - 1, min_new_tokens=N - 1, pad_token_id=0)
    anchors = torch.arange(N - K).expand(ROWS, -1)
    batch = TextBatch(text, anchors, window_noise(0, torch.arange(ROWS), anchors, K))
    optimizer = torch.optim.AdamW([p for p in step.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(steps):
        sums = step(batch)
        loss = sums.loss / batch.target_tokens
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, step.model.eval()


@pytest.mark.long
@pytest.mark.parametrize("family", CONFIGS)
def test_a_student_of_each_family_learns_from_text_and_gives_the_ar_models_text(family, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)  # distributions that are far from uniform
    model.save_pretrained(tmp_path / "ar")
    losses, student = trained(tmp_path / "ar")
    assert losses[-1] < 0.8 * losses[0]
    student.save_pretrained(tmp_path / "k4")

    ar, loaded = load_ar(str(tmp_path / "ar")), PushForwardLM.from_pretrained(tmp_path / "k4")
    requests = [
        Request(prompt=[1, 2, 3 + i], max_new_tokens=24, seed=i, sampling=SamplingParams(temperature=t))
        for i, t in enumerate((0, 0.7, 1.0))
    ]
    plain = Engine(ar, EngineConfig(4, 96, k=1, coupling="gumbel")).generate(requests)
    engine = Engine(loaded, EngineConfig(4, 96, acceptance="exact", adapt_width=False))
    exact = engine.generate(requests)
    assert [c.tokens for c in exact] == [c.tokens for c in plain]
    assert engine.stats.tokens_a_step > 1
    greedy = ar.generate(
        torch.tensor([requests[0].prompt]), do_sample=False, max_new_tokens=24, eos_token_id=None, pad_token_id=0
    )
    assert exact[0].tokens == greedy[0, 3:].tolist()
