"""Slow and obvious versions of what the rest does fast, for tests and benchmarks to hold it against.

`decode` is the decode loop without cache, slots or batches: what the engine has to equal token for token. `dense_states`
and `dense_attention` are the staircase as one mask over context and blocks, at a cost of O((N + W·L)²).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kforcing.coupling import Draw
from kforcing.keys import derive_key
from kforcing.modeling import PushForwardLM, one_window
from kforcing.noise import uniform


@torch.no_grad()
def decode(
    model: PushForwardLM | PreTrainedModel,
    prompt: list[int],
    max_new_tokens: int,
    *,
    seed: int = 0,
    k: int = 1,
    temperature: float = 1.0,
    stop_ids: frozenset[int] = frozenset(),
    coupling: Draw | None = None,
    acceptance: str = "fixed",
) -> list[int]:
    """Continue one prompt, reading all of it again at every step.

    The token at absolute position p is made from z(seed, p), whatever k is, so decoders of different k can be compared
    under the same noise.

    Args:
        model: a student, or an AR model that draws by `coupling`.
        k: tokens a step.
        acceptance: `fixed` keeps every token of a step. `exact` keeps the first, which is the AR model's own, and those
            behind it as long as they equal what the AR model inside the student draws; the token that differs is replaced
            by the AR model's, and the rest is dropped.
    Returns:
        The new token ids, without the stop id.
    """
    step = _student_step(model) if isinstance(model, PushForwardLM) else _ar_step(model, coupling)
    key, zero = derive_key(seed, "decode"), torch.zeros(1, dtype=torch.int64)
    ids = list(prompt)
    while len(ids) < len(prompt) + max_new_tokens:
        noise_K = uniform(key, zero, 0, torch.arange(len(ids), len(ids) + k))
        block = step(torch.tensor([ids]), noise_K[None], temperature)[0].tolist()
        if acceptance == "exact" and isinstance(model, PushForwardLM):
            block = _verified(model, ids, block, noise_K, temperature)
        for token in block:
            if token in stop_ids:
                return ids[len(prompt) :][:max_new_tokens]
            ids.append(token)
            if len(ids) == len(prompt) + max_new_tokens:
                break
    return ids[len(prompt) :]


Step = Callable[[Tensor, Tensor, float], Tensor]
"""(1, N) ids, (1, k) noise and a temperature → (1, k) tokens."""


def _student_step(student: PushForwardLM) -> Step:
    def step(ids: Tensor, noise: Tensor, temperature: float) -> Tensor:
        return student.draw(one_window(ids, noise, temperature)).tokens_BWK[:, 0]

    return step


def _verified(
    student: PushForwardLM, ids: list[int], block: list[int], noise_K: Tensor, temperature: float
) -> list[int]:
    """The tokens of a block up to the first that is not the AR model's own, and the AR model's token in its place."""
    own = _ar_step(student.backbone, student.readout.pick)
    for j, token in enumerate(block):
        expected = own(torch.tensor([ids + block[:j]]), noise_K[None, j : j + 1], temperature).item()
        if token != expected:
            return [*block[:j], int(expected)]
    return block


def _ar_step(backbone: PreTrainedModel, coupling: Draw | None) -> Step:
    assert coupling is not None, "an AR model needs a coupling"

    def step(ids: Tensor, noise: Tensor, temperature: float) -> Tensor:
        logits = backbone(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1].float()
        return coupling(logits, noise[:, 0], temperature)[:, None]

    return step


def staircase_mask(anchors_BW: Tensor, n_context: int, block: int) -> Tensor:
    """(B, 1, N + W·L, N + W·L) bool, True = attend: context and all blocks in one pass."""
    B, W = anchors_BW.shape
    mask = torch.zeros(B, *[n_context + W * block] * 2, dtype=torch.bool, device=anchors_BW.device)
    mask[:, :n_context, :n_context] = torch.ones_like(mask[0, :n_context, :n_context]).tril()
    sees_context = torch.arange(n_context, device=anchors_BW.device) <= anchors_BW[..., None]
    mask[:, n_context:, :n_context] = sees_context.repeat_interleave(block, dim=1)
    window = torch.arange(W, device=anchors_BW.device).repeat_interleave(block)
    mask[:, n_context:, n_context:] = (window[:, None] == window).tril()
    return mask[:, None]


def dense_states(stack: nn.Module, context_BND: Tensor, anchors_BW: Tensor, block_BWLD: Tensor) -> Tensor:
    """What reading blocks after a context gives, in a single pass under the dense mask: (B, W, L, D).

    Args:
        stack: base model, with sdpa attention or the staircase's, which is the same here.
        context_BND: input embeddings of the context.
        anchors_BW: int64, position of the last context token each window sees.
        block_BWLD: input embeddings of the blocks.
    """
    (B, N, _), (W, L) = context_BND.shape, block_BWLD.shape[1:3]
    offsets_L = torch.arange(L, device=anchors_BW.device)
    context = torch.arange(N, device=anchors_BW.device).expand(B, N)
    states = stack(
        inputs_embeds=torch.cat([context_BND, block_BWLD.flatten(1, 2)], dim=1),
        position_ids=torch.cat([context, (anchors_BW[..., None] + 1 + offsets_L).flatten(1)], dim=1),
        attention_mask=staircase_mask(anchors_BW, N, L),
        use_cache=False,
    ).last_hidden_state
    return states[:, N:].unflatten(1, (W, L))


def dense_attention(
    q_BHSE: Tensor,
    keys_BJNE: Tensor,
    values_BJNE: Tensor,
    own_keys_BJWTE: Tensor,
    own_values_BJWTE: Tensor,
    anchors_BW: Tensor,
    scale: float,
) -> Tensor:
    """`kforcing.attention.staircase_attention` as one softmax under a dense mask: (B, S, H, E)."""
    W, T = own_keys_BJWTE.shape[2:4]
    L, N = q_BHSE.shape[2] // W, keys_BJNE.shape[2]
    sees_context = (torch.arange(N) <= anchors_BW[..., None]).repeat_interleave(L, dim=1)
    own = torch.kron(torch.eye(W), torch.ones(L, T).tril(T - L)).bool().expand(len(q_BHSE), -1, -1)
    sees = torch.cat([sees_context, own], dim=2)[:, None]
    groups = q_BHSE.shape[1] // keys_BJNE.shape[1]
    keys = torch.cat([keys_BJNE, own_keys_BJWTE.flatten(2, 3)], dim=2).repeat_interleave(groups, dim=1)
    values = torch.cat([values_BJNE, own_values_BJWTE.flatten(2, 3)], dim=2).repeat_interleave(groups, dim=1)
    scores = (q_BHSE @ keys.mT * scale).masked_fill(~sees, -torch.inf)
    return (scores.softmax(dim=-1) @ values).transpose(1, 2)
