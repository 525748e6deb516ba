"""Keys and values of prompts that were read before, so that a prompt with the same beginning need not be read whole again.

Prompts are cut into blocks of `block` tokens. A block is found by its own tokens and all before them, and holds what the
trunk made of it in every layer. Blocks that were used least recently are dropped first. Texts do not change: the keys
and values are those that reading would make, up to rounding that depends on the shapes of reads, as between any two batches.

Shapes: Y layers, H heads of keys, N tokens of a block, E width of a head.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kforcing.engine.cache import SlotCache

BLOCK = 32
"""Tokens of a block, where nobody chose."""


class PrefixCache:
    """Blocks of prompts, at most so many bytes of them.

    Args:
        slots: the cache that blocks are copied from and to.
        max_bytes: of all blocks together; 0 keeps none.
        block: N.
        device: where blocks are kept; None for where the slots are.
    """

    def __init__(self, slots: SlotCache, max_bytes: int, block: int = BLOCK, device: str | None = None):
        self.slots, self.max_bytes, self.block, self.device = slots, max_bytes, block, device
        self.bytes = 0
        self._blocks: OrderedDict[bytes, Tensor] = OrderedDict()
        """Name of a block → (Y, 2 · H, N, E)."""

    def match(self, prompt: Sequence[int], most: int) -> int:
        """How many of the first `most` tokens of a prompt are here."""
        found = 0
        for name in self._names(prompt, most) if self._blocks else ():
            if name not in self._blocks:
                break
            found += self.block
        return found

    def restore(self, slot: int, prompt: Sequence[int], tokens: int) -> None:
        """Copy the first tokens of a prompt, as many as `match` has found, to a slot."""
        names = list(self._names(prompt, tokens))
        self.slots.put(slot, torch.cat([self._blocks[name] for name in names], dim=2))
        self._used(names)

    def keep(self, slot: int, prompt: Sequence[int], tokens: int) -> None:
        """Keep the whole blocks of the first tokens of a prompt, which a slot holds."""
        if not self.max_bytes:
            return
        names = list(self._names(prompt, tokens))
        for i, name in enumerate(names):
            if name not in self._blocks:
                made = self.slots.take(slot, i * self.block, self.block).to(self.device or self.slots.device)
                self._blocks[name] = made
                self.bytes += made.nbytes
        self._used(names)
        while self.bytes > self.max_bytes:
            self.bytes -= self._blocks.popitem(last=False)[1].nbytes

    def _used(self, names: list[bytes]) -> None:
        """Note that blocks were used. A block cannot be used without those before it, so the first block is dropped last."""
        for name in reversed(names):
            self._blocks.move_to_end(name)

    def _names(self, prompt: Sequence[int], tokens: int) -> Iterator[bytes]:
        """The names of the whole blocks of the first tokens: each a hash of the tokens up to its end."""
        digest = hashlib.blake2b(digest_size=16)
        for start in range(0, tokens - self.block + 1, self.block):
            digest.update(array("q", prompt[start : start + self.block]).tobytes())
            yield digest.digest()
