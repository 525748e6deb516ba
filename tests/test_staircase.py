import pytest
import torch

from kforcing.staircase import ar_block_logits, ar_logits, lm_head, staircase_mask, staircase_states
from tests.conftest import VOCAB, make_backbone


def windows(seed=0, B=3, N=9, W=4, P=3):
    g = torch.Generator().manual_seed(seed)
    context = torch.randint(0, VOCAB, (B, N), generator=g)
    anchors = torch.stack([torch.randperm(N, generator=g)[:W] for _ in range(B)])
    return context, anchors, torch.randint(0, VOCAB, (B, W, P), generator=g)


def test_mask_is_the_staircase():
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


def test_each_window_sees_what_a_plain_pass_over_its_own_context_sees(backbone):
    context, anchors, block = windows()
    with torch.no_grad():
        _, states = staircase_states(backbone, context, anchors, backbone.get_input_embeddings()(block))
        for b in range(len(context)):
            for w, anchor in enumerate(anchors[b].tolist()):
                row = torch.cat([context[b, : anchor + 1], block[b, w]])[None]
                plain = backbone.base_model(input_ids=row).last_hidden_state[0, anchor + 1 :]
                torch.testing.assert_close(states[b, w], plain, rtol=1e-4, atol=1e-4)


def test_context_states_do_not_see_the_windows():
    backbone = make_backbone()
    context, anchors, block = windows()
    with torch.no_grad():
        states, _ = staircase_states(backbone, context, anchors, backbone.get_input_embeddings()(block))
        plain = backbone.base_model(input_ids=context).last_hidden_state
    torch.testing.assert_close(states, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("P", [0, 1, 3])
def test_ar_logits_continue_each_prefix(backbone, P):
    context, anchors, prefix = windows(P=P)
    with torch.no_grad():
        logits = ar_logits(backbone, context, anchors, prefix)
        for b in range(len(context)):
            for w, anchor in enumerate(anchors[b].tolist()):
                row = torch.cat([context[b, : anchor + 1], prefix[b, w]])[None]
                torch.testing.assert_close(logits[b, w], backbone(input_ids=row).logits[0, -1], rtol=1e-4, atol=1e-4)


def test_block_logits_are_the_stepwise_ones():
    backbone = make_backbone()
    context, anchors, tokens = windows(P=4)
    with torch.no_grad():
        block = ar_block_logits(backbone, context, anchors, tokens)
        for j in range(4):
            step = ar_logits(backbone, context, anchors, tokens[..., :j])
            torch.testing.assert_close(block[:, :, j], step, rtol=1e-4, atol=1e-4)


def test_lm_head_is_the_output_embedding(backbone):
    states = torch.randn(2, 16)
    torch.testing.assert_close(lm_head(backbone, states), states @ backbone.get_output_embeddings().weight.T)
