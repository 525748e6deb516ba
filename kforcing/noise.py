"""Counter-based noise: every z is a pure function of (key, sequence, window, offset).

No generator is shared or advanced. Three things follow. A retried rollout, another batch size or another number of workers
reproduces the same z. Rows of a rollout need not hold the noise, because it can be computed again. AR and push-forward
decoding can be compared under the same draws.

The generator is Philox4x32-10 (Salmon et al., *Parallel Random Numbers: As Easy as 1, 2, 3*, SC 2011), written in int64
torch arithmetic, so CPU and GPU give the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kforcing.keys import derive_key

_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four 32-bit words from a 128-bit counter and a 64-bit key, elementwise.

    Args:
        counter: four broadcastable int64 tensors, each holding values in [0, 2**32).
        key: two broadcastable int64 tensors, each holding values in [0, 2**32).
    Returns:
        Four int64 tensors of the broadcast shape with values in [0, 2**32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # int64 products wrap, but the bits are those of the unsigned product.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32) & _LOW ^ c1 ^ k0, p1 & _LOW, (p0 >> 32) & _LOW ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def uniform(key: Tensor | int, sequence: Tensor, window: Tensor | int, offset: Tensor) -> Tensor:
    """z in the open interval (0, 1) for each (sequence, window, offset), broadcast together.

    Args:
        key: int64 tensor or int from `derive_key`.
        sequence: int64 sequence ids.
        window: int64 position of the window's last context token in [0, 2**32); serving, which numbers tokens by
            absolute position, uses 0.
        offset: int64 index inside the window (training) or absolute position (serving), in [0, 2**32).
    Returns:
        float64 tensor of the broadcast shape; values are (n + 1/2) / 2**52, so never exactly 0 or 1.
    """
    device = offset.device
    key = torch.as_tensor(key, dtype=torch.int64, device=device)
    window = torch.as_tensor(window, dtype=torch.int64, device=device)
    counter = (sequence & _LOW, (sequence >> 32) & _LOW, window, offset)
    words = philox4x32(counter, (key & _LOW, (key >> 32) & _LOW))
    n = (words[0] << 20) | (words[1] >> 12)
    return (n.to(torch.float64) + 0.5) * 2.0**-52


def race_words(z: Tensor, ids: Tensor) -> Tensor:
    """A word of 31 bits for each token: (...) float64 in [0, 1) and (n,) or (..., n) integers → (..., n)
    int32.

    The 52 bits of z key a permutation of 32-bit words (an id times an odd number plus the low bits, then Wellons'
    `triple32` mixer with the high bits added after its first round), so each word is uniform over draws of z, and the n of
    one z are independent of each other and of those of other z for every practical purpose. int32 products wrap, and the
    shifts are made logical by a mask, so CPU and GPU give the same bits.
    """
    low, high = race_key(z)
    x = ids.to(torch.int32) * RACE_STRIDE + low[..., None]
    for i, (shift, multiplier) in enumerate(RACE_ROUNDS):
        x ^= (x >> shift).bitwise_and_(_LOW >> shift)
        x *= multiplier
        if i == 0:
            x += high[..., None]
    x ^= (x >> RACE_LAST_SHIFT).bitwise_and_(_LOW >> RACE_LAST_SHIFT)
    return x.bitwise_and_(_LOW >> 1)


def race_key(z: Tensor) -> tuple[Tensor, Tensor]:
    """(...) float64 noise in [0, 1) → (...) int32 tensors, the low 32 bits of its 52 and the others."""
    bits = (z * 2.0**52).to(torch.int64)
    return bits.to(torch.int32), (bits >> 32).to(torch.int32)


def _signed(word: int) -> int:
    """The int32 of the same 32 bits."""
    return word - ((word >> 31) << 32)


RACE_STRIDE = _signed(_WEYL[0])
"""What an id is multiplied by."""
RACE_ROUNDS = ((17, _signed(0xED5AD4BB)), (11, _signed(0xAC4C1B51)), (15, _signed(0x31848BAB)))
"""Shift and multiplier of each round of `triple32`."""
RACE_LAST_SHIFT = 14


def window_noise(key: Tensor | int, sequence_B: Tensor, anchors_BW: Tensor, k: int) -> Tensor:
    """Noise of the windows of a batch: (B,) ids and (B, W) anchors give (B, W, k) float64 in (0, 1).

    Where an anchor occurs several times in a sequence, its windows have independent noise: the number of the occurrence is
    in the high bits of the offset.
    """
    offsets_K = torch.arange(k, device=anchors_BW.device)
    draws_BW = repetitions(anchors_BW)
    if isinstance(key, Tensor):
        key = key[:, None, None]
    return uniform(key, sequence_B[:, None, None], anchors_BW[:, :, None], offsets_K + (draws_BW[..., None] << 16))


def repetitions(anchors_BW: Tensor) -> Tensor:
    """How often each anchor occurred before in its sequence: (B, W) int64, zeros when all are different."""
    sorted_BW, order_BW = anchors_BW.sort(dim=1, stable=True)
    places_W = torch.arange(anchors_BW.shape[1], device=anchors_BW.device)
    count_BW = places_W - torch.searchsorted(sorted_BW, sorted_BW)
    return torch.empty_like(order_BW).scatter_(1, order_BW, count_BW)


def sample_anchors(key: Tensor | int, sequence_B: Tensor, n_context: int, n_windows: int) -> Tensor:
    """`n_windows` different anchors in [0, n_context) for each sequence, sorted: (B,) → (B, W) int64.

    The anchor is the position of the last context token that a window sees. Raises ValueError when `n_windows` is not
    between 1 and `n_context`.
    """
    if not 1 <= n_windows <= n_context:
        raise ValueError(f"{n_windows} windows asked of a sequence with {n_context} positions; need 1 to {n_context}")
    if isinstance(key, Tensor):
        key = key[:, None]
    order_BN = uniform(key, sequence_B[:, None], _LOW, torch.arange(n_context, device=sequence_B.device))
    return order_BN.argsort(dim=1, stable=True)[:, :n_windows].sort(dim=1).values


def choice_seed(seed: int, choice: int) -> int:
    """The seed of one of several continuations of a prompt: choice 0 has the given seed, the others derive theirs."""
    return seed if choice == 0 else derive_key(seed, "choice", choice)
