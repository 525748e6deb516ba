import pytest
import torch
from transformers import AutoModelForCausalLM, FalconConfig, LlamaConfig

from kforcing import PushForwardLM
from kforcing.attention import staircase as attention
from kforcing.attention.reader import ATTENTION, BlockReader, ar_block_logits
from kforcing.attention.windows import Windows, read_context
from kforcing.backbone import embeddings, lm_head
from kforcing.reference import dense_states, staircase_mask
from tests.models import VOCAB, make_backbone


def windows(seed=0, B=3, N=9, W=4, P=3):
    g = torch.Generator().manual_seed(seed)
    context = torch.randint(0, VOCAB, (B, N), generator=g)
    anchors = torch.stack([torch.randperm(N, generator=g)[:W] for _ in range(B)])
    return context, anchors, torch.randint(0, VOCAB, (B, W, P), generator=g)


def dense_block_states(backbone, context, anchors, block):
    """Block states of a single pass under the dense mask."""
    embed = backbone.get_input_embeddings()
    return dense_states(backbone.base_model, embed(context), anchors, embed(block))


def two_pass_states(backbone, context, anchors, block, split=None):
    """The same by a context pass and block passes of `split` entries."""
    reader = BlockReader(backbone.base_model, read_context(backbone, context).layers, anchors)
    embeds = backbone.get_input_embeddings()(block)
    return torch.cat([reader.read(part) for part in embeds.split(split or embeds.shape[2], dim=2)], dim=2)


def test_the_reference_mask_is_the_staircase():
    mask = staircase_mask(torch.tensor([[1, 2]]), n_context=3, block=2)[0, 0].int().tolist()
    assert mask == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 0, 1, 0, 0, 0],
        [1, 1, 0, 1, 1, 0, 0],
        [1, 1, 1, 0, 0, 1, 0],
        [1, 1, 1, 0, 0, 1, 1],
    ]


@pytest.mark.parametrize("split", [None, 1, 2])
def test_reading_blocks_equals_one_dense_pass_with_its_gradients(backbone, split):
    context, anchors, block = windows()
    weights = torch.randn(3, 4, 3, 16, generator=torch.Generator().manual_seed(1))
    gradients = []
    dense = dense_block_states(backbone, context, anchors, block)
    two = two_pass_states(backbone, context, anchors, block, split)
    torch.testing.assert_close(two, dense, rtol=1e-4, atol=1e-5)
    for states in (dense, two):
        backbone.zero_grad()
        (states * weights).sum().backward()
        gradients.append([p.grad.clone() for p in backbone.base_model.parameters()])
    for expected, actual in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


def assert_same_with_gradients(mine, theirs, backbone, seed=1):
    """States to 1e-5, gradients to 1e-5 of each tensor's largest entry (or of the largest of all, where it is tiny)."""
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    weights = torch.randn(mine.shape, generator=torch.Generator().manual_seed(seed))
    parameters = list(backbone.base_model.parameters())
    gradients = [torch.autograd.grad(x, parameters, weights, allow_unused=True) for x in (mine, theirs)]
    largest = max(g.abs().max() for g in gradients[1] if g is not None)
    for actual, expected in zip(*gradients, strict=True):
        if expected is not None:
            assert (actual - expected).abs().max() < 1e-5 * max(expected.abs().max(), 0.1 * largest)


@pytest.mark.parametrize("k", range(1, 9))
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("kind", ["full", "sampled"])
def test_training_passes_of_every_k_equal_the_dense_one(monkeypatch, name, k, kind):
    monkeypatch.setattr(attention, "WINDOWS_A_CALL", 8)
    backbone, N = make_backbone(name, scale=2.0), 20
    g = torch.Generator().manual_seed(k)
    context = torch.randint(0, VOCAB, (2, N), generator=g)
    sampled = torch.randint(0, N, (2, 13), generator=g).sort(dim=1).values  # with repeats, different in each row
    anchors = torch.arange(N).expand(2, N) if kind == "full" else sampled
    block = torch.randint(0, VOCAB, (2, anchors.shape[1], k), generator=g)
    dense = dense_block_states(backbone, context, anchors, block)
    assert_same_with_gradients(two_pass_states(backbone, context, anchors, block), dense, backbone)


@pytest.mark.parametrize("k", [2, 8])
def test_every_window_of_512_tokens_equals_the_dense_pass(k):
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
    )
    torch.manual_seed(0)
    backbone = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    context, block = torch.randint(0, VOCAB, (1, 512)), torch.randint(0, VOCAB, (1, 512, k))
    anchors = torch.arange(512)[None]
    dense = dense_block_states(backbone, context, anchors, block)
    assert_same_with_gradients(two_pass_states(backbone, context, anchors, block), dense, backbone)


@pytest.mark.parametrize("k", range(1, 9))
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_both_teacher_passes_of_self_forcing_equal_the_dense_one(name, k):
    """The second has k committed tokens between context and hints."""
    student = PushForwardLM.from_backbone(make_backbone(name, scale=2.0), k).eval()
    context, anchors, tokens = windows(P=k)
    noise = torch.rand(3, 4, k, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    embed, hints = embeddings(student.backbone), student.readout.noise_encoder(noise, torch.ones_like(noise))
    for prefix in (None, tokens):
        block = hints if prefix is None else torch.cat([embed(prefix), hints], dim=2)
        states = dense_states(student.backbone.base_model, embed(context), anchors, block)[:, :, -k:]
        mine = student.scores(Windows(context, anchors, noise, torch.ones(3), prefix), tokens).logits_BWKV
        assert_same_with_gradients(mine, lm_head(student.backbone, states), student.backbone)
        hints = student.readout.noise_encoder(noise, torch.ones_like(noise))


def test_reading_blocks_leaves_other_passes_and_the_config_as_they_were(backbone):
    ids, anchors, block = windows()
    before, record = backbone(input_ids=ids).logits, backbone.config.to_dict()
    two_pass_states(backbone, ids, anchors, block)
    assert backbone.config._attn_implementation == ATTENTION
    assert torch.equal(backbone(input_ids=ids).logits, before)
    assert backbone.config.to_dict() == record
    padded = torch.ones_like(ids)
    padded[0, :3] = 0
    with_mask = backbone(input_ids=ids, attention_mask=padded).logits
    backbone.set_attn_implementation("sdpa")
    assert torch.equal(backbone(input_ids=ids, attention_mask=padded).logits, with_mask)


def test_a_backbone_with_an_attention_of_its_own_is_refused():
    config = FalconConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, num_attention_heads=4)
    backbone = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ValueError, match="FalconModel does not call its attention through"):
        PushForwardLM.from_backbone(backbone, 2)


def test_blocks_are_not_read_with_dropout():
    backbone = make_backbone("gpt2")
    with pytest.raises(ValueError, match="dropout, which reads of blocks do not support; call eval"):
        two_pass_states(backbone.train(), *windows())


def test_each_window_sees_what_a_plain_pass_over_its_own_context_sees(backbone):
    context, anchors, block = windows()
    with torch.no_grad():
        states = two_pass_states(backbone, context, anchors, block)
        for b in range(len(context)):
            for w, anchor in enumerate(anchors[b].tolist()):
                row = torch.cat([context[b, : anchor + 1], block[b, w]])[None]
                plain = backbone.base_model(input_ids=row).last_hidden_state[0, anchor + 1 :]
                torch.testing.assert_close(states[b, w], plain, rtol=1e-4, atol=1e-4)


def test_a_fork_continues_from_the_entries_that_were_read_before_it():
    backbone = make_backbone()
    context, anchors, block = windows()
    embeds = backbone.get_input_embeddings()(block)
    with torch.no_grad():
        reader = BlockReader(backbone.base_model, read_context(backbone, context).layers, anchors)
        reader.read(embeds[:, :, :1])
        other = reader.fork(backbone.base_model, 2)
        rest = reader.read(embeds[:, :, 1:])
        torch.testing.assert_close(other.read(embeds[:, :, 1:]), rest)
        whole = two_pass_states(backbone, context, anchors, block)
    torch.testing.assert_close(rest, whole[:, :, 1:], rtol=1e-4, atol=1e-5)


def test_block_logits_equal_those_of_single_steps(backbone):
    context, anchors, tokens = windows(P=4)
    with torch.no_grad():
        logits = ar_block_logits(backbone, read_context(backbone, context), anchors, tokens)
        for b in range(len(context)):
            for w, anchor in enumerate(anchors[b].tolist()):
                row = torch.cat([context[b, : anchor + 1], tokens[b, w, :-1]])[None]
                plain = backbone(input_ids=row).logits[0, anchor:]
                torch.testing.assert_close(logits[b, w], plain, rtol=1e-4, atol=1e-4)


def test_lm_head_is_the_output_embedding(backbone):
    states = torch.randn(2, 16)
    torch.testing.assert_close(lm_head(backbone, states), states @ backbone.get_output_embeddings().weight.T)
