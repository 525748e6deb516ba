import pytest
import torch

from kforcing.staircase import BlockReader, ar_block_logits, lm_head, read_context
from tests.conftest import VOCAB, make_backbone


def windows(seed=0, B=3, N=9, W=4, P=3):
    g = torch.Generator().manual_seed(seed)
    context = torch.randint(0, VOCAB, (B, N), generator=g)
    anchors = torch.stack([torch.randperm(N, generator=g)[:W] for _ in range(B)])
    return context, anchors, torch.randint(0, VOCAB, (B, W, P), generator=g)


def staircase_mask(anchors_BW, n_context, block):
    """The dense reference: (B, 1, N + W·L, N + W·L), True = attend, context and all blocks in one pass."""
    B, W = anchors_BW.shape
    rows = n_context + W * block
    mask = torch.zeros(B, rows, rows, dtype=torch.bool)
    mask[:, :n_context, :n_context] = torch.ones(n_context, n_context).tril().bool()
    sees_context = torch.arange(n_context) <= anchors_BW[..., None]
    mask[:, n_context:, :n_context] = sees_context.repeat_interleave(block, dim=1)
    mask[:, n_context:, n_context:] = torch.block_diag(*[torch.ones(block, block).tril()] * W).bool()
    return mask[:, None]


def dense_states(backbone, context, anchors, block):
    """Block states of a single pass under the dense mask."""
    N, (W, L) = context.shape[1], block.shape[1:3]
    embed = backbone.get_input_embeddings()
    positions = torch.cat(
        [torch.arange(N).expand(len(context), N), (anchors[..., None] + 1 + torch.arange(L)).flatten(1)], dim=1
    )
    states = backbone.base_model(
        inputs_embeds=embed(torch.cat([context, block.flatten(1)], dim=1)),
        position_ids=positions,
        attention_mask=staircase_mask(anchors, N, L),
        use_cache=False,
    ).last_hidden_state
    return states[:, N:].unflatten(1, (W, L))


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
    dense = dense_states(backbone, context, anchors, block)
    two = two_pass_states(backbone, context, anchors, block, split)
    torch.testing.assert_close(two, dense, rtol=1e-4, atol=1e-5)
    for states in (dense, two):
        backbone.zero_grad()
        (states * weights).sum().backward()
        gradients.append([p.grad.clone() for p in backbone.base_model.parameters()])
    for expected, actual in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


def test_each_window_sees_what_a_plain_pass_over_its_own_context_sees(backbone):
    context, anchors, block = windows()
    with torch.no_grad():
        states = two_pass_states(backbone, context, anchors, block)
        for b in range(len(context)):
            for w, anchor in enumerate(anchors[b].tolist()):
                row = torch.cat([context[b, : anchor + 1], block[b, w]])[None]
                plain = backbone.base_model(input_ids=row).last_hidden_state[0, anchor + 1 :]
                torch.testing.assert_close(states[b, w], plain, rtol=1e-4, atol=1e-4)


def test_a_fork_reads_on_from_where_it_was_made():
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


def test_block_logits_are_the_stepwise_ones(backbone):
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
