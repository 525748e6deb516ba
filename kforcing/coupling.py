"""Couplings: maps from (distribution, noise) to a token, which sample the distribution when the noise is uniform.

Each coupling is a function of (logits, z, temperature). Each token has one uniform number z.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kforcing.cpu.race import Left, can_race, may_win
from kforcing.noise import race_words

_SMALLEST = 5e-324
ENTRIES = {"cpu": 2**17}
"""Logits at a time, 2²⁵ elsewhere. What is made of them is larger, and on a CPU stays in the caches."""
RACE_ENTRIES = 2**25
"""The same where the kernel leaves few of them."""
BLOCK = 256
"""Scores of which the largest is sought at a time."""


class Coupling(Protocol):
    """(..., V) logits, (...) noise and temperature → (...) int64 token ids.

    Where the logits are those of some tokens only, (V,) `ids` names them in ascending order. The token is then the same as if
    all others had −inf.
    """

    def __call__(self, logits: Tensor, z: Tensor, temperature: Tensor | float, ids: Tensor | None = None) -> Tensor:
        """Draw."""
        ...


Draw = Callable[[Tensor, Tensor, Tensor | float], Tensor]
"""The same of all tokens."""


def inverse_cdf(logits: Tensor, z: Tensor, temperature: Tensor | float = 1.0, ids: Tensor | None = None) -> Tensor:
    """Inverse CDF in vocabulary order, F⁻¹(z) = min { v : Σ_{v' ≤ v} p(v') ≥ z } (K-Forcing's coupling).

    The CDF is accumulated in float64, unnormalised, and z scaled by where it ends, so rounding can never leave a z beyond
    the last token. A z that equals a step of the CDF takes the lower token, as the formula says. At z = 0, where the formula
    would return token 0 even if its probability is zero, the first token of positive probability is returned: a
    token of probability zero is never drawn.

    Args:
        logits: (..., V) floating point; float32 or wider is wanted, because bf16 logits move the CDF's steps.
        z: (...) uniform noise in [0, 1).
        temperature: divides the logits; a scalar or broadcastable to (...).
        ids: (V,) int64, ascending: the tokens whose logits these are; all when omitted.
    Returns:
        (...) int64 token ids.
    """
    place = _by_rows(_inverse_cdf, logits, z, temperature)
    return place if ids is None else ids[place]


def _inverse_cdf(logits: Tensor, z: Tensor, temperature: Tensor | float) -> Tensor:
    logits = _tempered(logits, temperature)
    cdf = (logits - logits.amax(dim=-1, keepdim=True)).exp_().cumsum_(dim=-1)
    z = z.to(torch.float64).clamp(min=_SMALLEST)[..., None] * cdf[..., -1:]
    # Beyond the last token only where logits were not numbers; an id outside the vocabulary would do worse harm.
    return torch.searchsorted(cdf, z, side="left").squeeze(-1).clamp_(max=logits.shape[-1] - 1)


def gumbel_max(logits: Tensor, z: Tensor, temperature: Tensor | float = 1.0, ids: Tensor | None = None) -> Tensor:
    """Gumbel-max: argmax over v of log p(v) + g_v(z), with g_v(z) = −log(−log(1 − w_v(z))) standard Gumbel.

    The V uniforms w_v are made from the bits of z by a counter-based mixer (`race_words`), so z is still the only noise.
    Two distributions under the same z pick the same token with probability at least (1 − TV) / (1 + TV): close
    distributions nearly always agree, and a rounding error seldom changes a token. Scores are float32. A winner has a small
    w_v, which float32 holds to 24 bits beyond its leading zeros; the w_v have 31 bits, which bounds the error of a token's
    probability by about 2⁻³¹, and large w_v end at 1 − 2⁻²³, so a token of probability zero is never drawn.

    Args:
        logits: (..., V) floating point.
        z: (...) uniform noise in [0, 1), float64: all of its bits matter.
        temperature: divides the logits; a scalar or broadcastable to (...).
        ids: (V,) int64, ascending: the tokens whose logits these are; all when omitted.
    Returns:
        (...) int64 token ids; of equal scores the lowest.
    """
    if ids is None:
        return _by_rows(_gumbel_max, logits, z, temperature, RACE_ENTRIES if can_race(logits) else None)
    return ids[first_largest(_scores(logits, race_words(z.to(torch.float64), ids), temperature)[0])]


@dataclass(frozen=True)
class Candidates:
    """The tokens of the largest perturbed scores, from which a token is drawn once better logits of them are known.

    Args:
        ids: (..., m) int64, ascending.
        race: (..., m) float32, what is subtracted from the logits over the temperature.
    """

    ids: Tensor
    race: Tensor

    def draw(self, logits: Tensor, temperature: Tensor | float) -> Tensor:
        """(..., m) logits of the candidates → (...) tokens: those of `gumbel_max` where all other logits are −inf."""
        scores = _tempered(logits, temperature, torch.float32) - self.race
        return self.ids.gather(-1, scores.argmax(dim=-1, keepdim=True)).squeeze(-1)


def gumbel_candidates(logits: Tensor, z: Tensor, temperature: Tensor | float, m: int) -> Candidates:
    """The m tokens with the largest perturbed scores, among which `gumbel_max` of nearly the same logits finds its winner.

    A winner need not be likely: its noise may be large. Candidates by logits alone would change the distribution.

    Args:
        logits, z, temperature: see `gumbel_max`.
        m: how many, at most V.
    """
    left = _left(logits, z, temperature, m)
    scores, race = _scores(left.logits, left.words, temperature)
    places = scores.topk(m, dim=-1, sorted=False).indices.sort(dim=-1).values
    return Candidates(left.ids.gather(-1, places), race.gather(-1, places))


def _gumbel_max(logits: Tensor, z: Tensor, temperature: Tensor | float) -> Tensor:
    left = _left(logits, z, temperature, 1)
    if left.ids.shape[-1] == 1:
        return left.ids.squeeze(-1)
    scores, _ = _scores(left.logits, left.words, temperature)
    return left.ids.gather(-1, first_largest(scores)[..., None]).squeeze(-1)


def _left(logits: Tensor, z: Tensor, temperature: Tensor | float, best: int) -> Left:
    """The tokens that may be among the `best`, (..., n) each: all tokens where the kernel cannot tell."""
    V, shape, z = logits.shape[-1], logits.shape[:-1], z.to(torch.float64)
    if can_race(logits, best):
        temperature_R = torch.as_tensor(temperature, dtype=torch.float64).expand(shape).reshape(-1)
        found = may_win(logits.reshape(-1, V), z.expand(shape).reshape(-1), temperature_R, best)
        if found:
            return Left(*(x.view(*shape, -1) for x in found))
    ids = torch.arange(V, device=z.device)
    return Left(ids.expand(logits.shape), race_words(z, ids), logits)


def _scores(logits: Tensor, words: Tensor, temperature: Tensor | float) -> tuple[Tensor, Tensor]:
    """The perturbed scores of the tokens with these `race_words`, and log(−log(1 − w)) of their noise w, which the race
    subtracts from their logits; float32."""
    w = words.to(torch.float32)
    race = w.mul_((2.0**-23 - 1) * 2.0**-31).sub_(2.0**-32).log1p_().neg_().log_()
    return _tempered(logits, temperature, torch.float32) - race, race


def first_largest(scores: Tensor) -> Tensor:
    """(..., V) → (...) int64: the index of the largest score, of equal ones the lowest, as `argmax` gives.

    It finds the block of the largest first, which is 5 times as fast on a CPU.
    """
    V = scores.shape[-1]
    if scores.device.type != "cpu" or V <= BLOCK:
        return scores.argmax(dim=-1)
    whole, rest = scores[..., : V - V % BLOCK], scores[..., V - V % BLOCK :]
    largest = whole.unflatten(-1, (-1, BLOCK)).amax(dim=-1)
    if V % BLOCK:
        largest = torch.cat([largest, rest.amax(dim=-1, keepdim=True)], dim=-1)
    ids = largest.argmax(dim=-1, keepdim=True) * BLOCK + torch.arange(BLOCK)
    inside = scores.gather(-1, ids.clamp_(max=V - 1)).argmax(dim=-1, keepdim=True)
    return ids.gather(-1, inside).squeeze(-1)


def _by_rows(draw: Draw, logits: Tensor, z: Tensor, temperature: Tensor | float, entries: int | None = None) -> Tensor:
    """`draw` of a few rows at a time."""
    shape, V = logits.shape[:-1], logits.shape[-1]
    size = max(1, (entries or ENTRIES.get(logits.device.type, 2**25)) // V)
    if shape.numel() <= size:
        return draw(logits, z, temperature)
    temperatures: Iterable[Tensor | float] = itertools.repeat(temperature)
    if isinstance(temperature, Tensor):
        temperatures = temperature.expand(shape).reshape(-1).split(size)
    parts = zip(logits.reshape(-1, V).split(size), z.expand(shape).reshape(-1).split(size), temperatures, strict=False)
    return torch.cat([draw(*part) for part in parts]).view(shape)


def _tempered(logits: Tensor, temperature: Tensor | float, dtype: torch.dtype = torch.float64) -> Tensor:
    """Logits over temperature, a tensor the caller may not write to."""
    logits = logits.to(dtype)
    if isinstance(temperature, Tensor):
        return logits / temperature.to(dtype)[..., None]
    return logits if temperature == 1.0 else logits / temperature


COUPLINGS: dict[str, Coupling] = {"inverse_cdf": inverse_cdf, "gumbel": gumbel_max}
