"""Keys and values of all slots, allocated once.

A slot has `max_model_len + k` columns, and column c holds position c of its request: what a step commits stays, what it only
needs for a moment (hints) stands in the columns that the next step overwrites. Nothing ever looks at a column beyond its
own position, so what a former request left there does not matter. Size in bytes, which the allocation equals:

    2 · layers · slots · (max_model_len + k) · heads of keys · width of a head · bytes of a number

Shapes: S slots, R a range of slots, C columns, L entries of a read, H heads of keys, E width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """Where the entries of one read stand, and what they see."""

    slots: slice
    """R consecutive slots."""
    columns: int
    """Columns that attention looks at, from the first."""
    positions_RL: Tensor
    """int64, position (= column) of each entry."""
    rows: Tensor
    """int64, the same as rows of a layer's flattened keys and values: slot, entry, head."""
    mask_R1LC: Tensor | None
    """0 where an entry sees a column and −inf where not; None when all see all."""


class SlotCache:
    """One (S, 2 · H, C, E) tensor a layer: the heads of keys, then those of values."""

    def __init__(
        self, layers: int, slots: int, columns: int, heads: int, width: int, dtype: torch.dtype, device: torch.device
    ):
        self.slots, self.columns, self.heads, self.width = slots, columns, heads, width
        shape = (slots, 2 * heads, columns, width)
        self.layers = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        self._first_row = (torch.arange(slots * 2 * heads, device=device) * columns).view(slots, 1, 2 * heads)
        self._columns = torch.arange(columns, device=device)

    @property
    def bytes(self) -> int:
        """Size of keys and values."""
        return sum(store.nbytes for store in self.layers)

    def span(self, slots: slice, positions_RL: Tensor, columns: int, masked: bool = True) -> Span:
        """The span of entries at given positions; not `masked` when each of them may see all the columns."""
        rows = (self._first_row[slots] + positions_RL[..., None]).flatten()
        mask = None
        if masked:
            unseen = self._columns[:columns] > positions_RL[:, None, :, None]
            mask = torch.zeros(unseen.shape, dtype=self.layers[0].dtype, device=unseen.device)
            mask.masked_fill_(unseen, -torch.inf)
        return Span(slots, columns, positions_RL, rows, mask)

    def write(self, layer: int, new: Tensor, span: Span) -> tuple[Tensor, Tensor]:
        """Store the entries of a span, (R · L, 2 · H, E): keys, then values; returns all that its slots hold.

        These are (R, H, columns, E) views of keys and of values.
        """
        store = self.layers[layer]
        store.view(-1, self.width).index_copy_(0, span.rows, new.reshape(-1, self.width))
        held = store[span.slots, :, : span.columns]
        return held[:, : self.heads], held[:, self.heads :]

    @property
    def device(self) -> torch.device:
        """Where keys and values are."""
        return self.layers[0].device

    def take(self, slot: int, start: int, length: int) -> Tensor:
        """A copy of some columns of a slot in all layers: (layers, 2 · H, length, E)."""
        return torch.stack([store[slot, :, start : start + length] for store in self.layers])

    def put(self, slot: int, columns_YHCE: Tensor) -> None:
        """Write the first columns of a slot in all layers, as `take` gives them."""
        for store, columns in zip(self.layers, columns_YHCE.to(self.device), strict=True):
            store[slot, :, : columns.shape[1]] = columns

    def move(self, source: int, target: int, columns: int) -> None:
        """Copy the first columns of a slot to another."""
        for store in self.layers:
            store[target, :, :columns] = store[source, :, :columns]
