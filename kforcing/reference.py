"""The decode loop without cache, slots or batches: slow, obvious, and what the engine has to equal token for token."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kforcing.coupling import Coupling
from kforcing.model import PushForwardLM, one_window
from kforcing.noise import derive_key, uniform


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
    coupling: Coupling | None = None,
) -> list[int]:
    """Continue one prompt, reading all of it again at every step.

    The token at absolute position p is made from z(seed, p), whatever k is, so decoders of different k can be compared
    under the same noise.

    Args:
        model: a student, or an AR model that draws by `coupling`.
        k: tokens a step.
    Returns:
        The new token ids, without the stop id.
    """
    step = _student_step(model) if isinstance(model, PushForwardLM) else _ar_step(model, coupling)
    key, zero = derive_key(seed, "decode"), torch.zeros(1, dtype=torch.int64)
    ids = list(prompt)
    while len(ids) < len(prompt) + max_new_tokens:
        noise_K = uniform(key, zero, 0, torch.arange(len(ids), len(ids) + k))
        for token in step(torch.tensor([ids]), noise_K[None], temperature)[0].tolist():
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


def _ar_step(backbone: PreTrainedModel, coupling: Coupling | None) -> Step:
    assert coupling is not None, "an AR model needs a coupling"

    def step(ids: Tensor, noise: Tensor, temperature: float) -> Tensor:
        logits = backbone(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1].float()
        return coupling(logits, noise[:, 0], temperature)[:, None]

    return step
