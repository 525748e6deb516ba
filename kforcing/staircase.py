"""The staircase: one pass over N context tokens serves W windows at once.

    context        c0 c1 c2 c3 ...            causal
    window w       [ y1 .. yP | h1 .. hK ]    sees c0..c_anchor(w), then itself causally; no other window

A window's block holds P tokens already committed (the teacher's second pass, or AR steps) and K hints. Block entry l
sits at position anchor + 1 + l: a hint stands at the position of the token it predicts.

Shapes: B batch, N context, W windows, P committed tokens, K hints, L = P + K block, D width, V vocabulary.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def staircase_mask(anchors_BW: Tensor, n_context: int, block: int) -> Tensor:
    """Dense boolean mask (True = attend), (B, 1, N + W·L, N + W·L), of the layout above.

    This is the reference; its size grows with the square of the number of positions.
    """
    B, W = anchors_BW.shape
    device = anchors_BW.device
    context_N = torch.arange(n_context, device=device)
    rows = n_context + W * block
    mask = torch.zeros(B, rows, rows, dtype=torch.bool, device=device)
    mask[:, :n_context, :n_context] = context_N[:, None] >= context_N[None, :]
    sees_context = context_N <= anchors_BW[..., None]
    mask[:, n_context:, :n_context] = sees_context.repeat_interleave(block, dim=1)
    within = torch.block_diag(*[torch.ones(block, block, device=device).tril()] * W) if W else None
    if within is not None:
        mask[:, n_context:, n_context:] = within.bool()
    return mask[:, None]


def staircase_states(
    backbone: PreTrainedModel, context_BN: Tensor, anchors_BW: Tensor, block_BWLD: Tensor
) -> tuple[Tensor, Tensor]:
    """Final hidden states of the context and of the windows' blocks.

    Args:
        backbone: a causal LM that takes `inputs_embeds`, `position_ids` and a 4-D boolean mask (sdpa attention).
        context_BN: int64 token ids.
        anchors_BW: int64, position of the last context token each window sees.
        block_BWLD: input embeddings of the blocks.
    Returns:
        context states (B, N, D) and block states (B, W, L, D).
    """
    B, N = context_BN.shape
    W, L = block_BWLD.shape[1:3]
    embeds = embeddings(backbone)(context_BN)
    positions = torch.arange(N, device=context_BN.device).expand(B, N)
    mask = None
    if W * L:
        embeds = torch.cat([embeds, block_BWLD.reshape(B, W * L, -1).to(embeds.dtype)], dim=1)
        block_positions = anchors_BW[..., None] + 1 + torch.arange(L, device=context_BN.device)
        positions = torch.cat([positions, block_positions.reshape(B, W * L)], dim=1)
        mask = staircase_mask(anchors_BW, N, L)
    states = backbone.base_model(
        inputs_embeds=embeds, position_ids=positions, attention_mask=mask, use_cache=False
    ).last_hidden_state
    return states[:, :N], states[:, N:].unflatten(1, (W, L))


def embeddings(backbone: PreTrainedModel) -> nn.Embedding:
    """The token embedding of a backbone."""
    return cast(nn.Embedding, backbone.get_input_embeddings())


def head(backbone: PreTrainedModel) -> nn.Linear:
    """The LM head of a backbone, shared by context and hints."""
    return cast(nn.Linear, backbone.get_output_embeddings())


def lm_head(backbone: PreTrainedModel, states: Tensor) -> Tensor:
    """Logits of hidden states: (..., D) → (..., V)."""
    return head(backbone)(states)


def ar_logits(backbone: PreTrainedModel, context_BN: Tensor, anchors_BW: Tensor, prefix_BWP: Tensor) -> Tensor:
    """The AR model's logits for the token after each window's committed prefix: (B, W, V) float32.

    `prefix_BWP` may be empty (P = 0): then the distribution is that of the token after the anchor.
    """
    context_BND, block_BWPD = staircase_states(backbone, context_BN, anchors_BW, embeddings(backbone)(prefix_BWP))
    if prefix_BWP.shape[2]:
        states_BWD = block_BWPD[:, :, -1]
    else:
        states_BWD = context_BND.gather(1, anchors_BW[..., None].expand(-1, -1, context_BND.shape[-1]))
    return lm_head(backbone, states_BWD).float()


def ar_block_logits(backbone: PreTrainedModel, context_BN: Tensor, anchors_BW: Tensor, tokens_BWK: Tensor) -> Tensor:
    """The AR model's logits for every token of given blocks, teacher-forced in one pass: (B, W, K, V) float32."""
    prefix_BWP = tokens_BWK[..., :-1]
    context_BND, block_BWPD = staircase_states(backbone, context_BN, anchors_BW, embeddings(backbone)(prefix_BWP))
    first_BWD = context_BND.gather(1, anchors_BW[..., None].expand(-1, -1, context_BND.shape[-1]))
    return lm_head(backbone, torch.cat([first_BWD[:, :, None], block_BWPD], dim=2)).float()
