"""Coupling: the map from (distribution, noise) to a token."""

from __future__ import annotations

import torch
from torch import Tensor

_SMALLEST = 5e-324


def inverse_cdf(logits: Tensor, z: Tensor, temperature: Tensor | float = 1.0) -> Tensor:
    """Inverse CDF in vocabulary order, F⁻¹(z) = min { v : Σ_{v' ≤ v} p(v') ≥ z } (K-Forcing's coupling).

    The CDF is accumulated in float64 and scaled to end in exactly 1, so rounding can never leave a z beyond the last
    token. A z that equals a step of the CDF takes the lower token, as the formula says. At z = 0, where the formula
    would return token 0 even if its probability is zero, the first token of positive probability is returned: a
    token of probability zero is never drawn.

    Args:
        logits: (..., V) floating point; float32 or wider is wanted, because bf16 logits move the CDF's steps.
        z: (...) uniform noise in [0, 1).
        temperature: divides the logits; a scalar or broadcastable to (...).
    Returns:
        (...) int64 token ids.
    """
    logits = logits.to(torch.float64)
    if isinstance(temperature, Tensor):
        logits = logits / temperature.to(torch.float64)[..., None]
    elif temperature != 1.0:
        logits = logits / temperature
    cdf = (logits - logits.amax(dim=-1, keepdim=True)).exp_().cumsum(dim=-1)
    cdf /= cdf[..., -1:].clone()
    z = z.to(torch.float64).clamp(min=_SMALLEST)[..., None].contiguous()
    return torch.searchsorted(cdf, z, side="left").squeeze(-1)
