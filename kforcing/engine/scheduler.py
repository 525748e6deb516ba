"""The scheduler: which request has which slot, and when its prompt is read.

    add ─► waiting ─► prefilling, a chunk of the prompts a step ─► running: slots 0 … n−1 ─► finished
                      slots p … p+r−1                              the last slot fills the hole

The scheduler keeps books and touches no tensor. Where a sequence changes its slot, it says so by a `Move`, which the engine
applies to the model runner.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from kforcing.engine.request import DraftCounts, Request, TokenLogprobs


@dataclass
class Sequence:
    """A request on its way through the engine."""

    id: int
    request: Request
    k: int
    """Tokens a step at most."""
    limit: int
    """Tokens returned at most."""
    exact: bool
    """Whether drafts are verified."""
    tail: int
    """Tokens at the end of the prompt that the first step reads: the engine's k. Steps of other requests, whose shape may
    cover this slot while its prompt is read, write to no column before them."""
    slot: int = -1
    filled: int = 0
    """Prompt tokens that were read already."""
    cached: int = 0
    """Those of them that were taken over from an earlier prompt."""
    new: list[int] = field(default_factory=list)
    """Tokens returned so far."""
    unread: int = field(init=False)
    """Tokens at the end of the slot that the trunk has not read: those of the last block."""
    drafts: int = 0
    """How many of these are drafts; as long as the host has not looked at a block, how many there are at most."""
    source: int = 0
    """Where they come from: 0 for the student, n for an earlier occurrence of the last n tokens."""
    steps: int = 0
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    """As far as the prompt was read, if the request asks for them; they leave with the first output."""
    counts: DraftCounts = field(default_factory=DraftCounts)

    def __post_init__(self) -> None:
        self.unread = self.tail

    @property
    def length(self) -> int:
        """Prompt tokens and returned tokens."""
        return len(self.request.prompt) + len(self.new)

    def made_block(self, size: int) -> None:
        """Note that a step made a block of so many tokens."""
        self.unread = size
        self.drafts = size - 1 if self.exact else 0

    def saw_block(self, source: int, drafts: int) -> None:
        """Note what the last block was."""
        self.source = source
        if self.exact:
            self.made_block(1 + drafts)

    @property
    def to_fill(self) -> int:
        """Prompt tokens that are read before the first step; not positive when the first step reads all of them."""
        return len(self.request.prompt) - self.tail


class Move(NamedTuple):
    """A sequence that changes its slot."""

    source: int
    target: int
    columns: int
    """How many columns of the slot are in use."""


class Chunk(NamedTuple):
    """Prompt positions to read next, for consecutive slots."""

    slots: slice
    start: int
    length: int


class Scheduler:
    """Admits sequences to slots, decides on chunks of prompts, and keeps running sequences in the first slots.

    Args:
        max_num_seqs: the number of slots.
        max_num_batched_tokens: prompt tokens of a chunk.
        one_by_one: read one prompt at a time, in chunks of one size (the batch-invariant mode).
    """

    def __init__(self, max_num_seqs: int, max_num_batched_tokens: int, one_by_one: bool):
        self.max_num_seqs, self.max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self.one_by_one = one_by_one
        self.waiting: deque[Sequence] = deque()
        self.prefilling: list[Sequence] = []
        self.running: list[Sequence] = []
        self.live: set[int] = set()
        """Ids of sequences that have neither ended nor been cancelled."""
        self._cancelled: set[int] = set()

    @property
    def idle(self) -> bool:
        """Whether no sequence waits or runs."""
        return not (self.waiting or self.prefilling or self.running)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self.waiting.append(sequence)
        self.live.add(sequence.id)

    def cancel(self, id: int) -> None:
        """Mark a sequence as cancelled; `drop_cancelled` frees its slot. Unknown and finished ids are ignored."""
        if id in self.live:
            self.live.discard(id)
            self._cancelled.add(id)

    def drop_cancelled(self) -> list[Move]:
        """Remove cancelled sequences from the queue and from their slots.

        A cancelled sequence whose prompt is being read keeps its slot until its group of prompts has been read.
        """
        if not self._cancelled:
            return []
        self.waiting = deque(s for s in self.waiting if s.id not in self._cancelled)
        leaving = [s for s in self.running if s.id in self._cancelled]
        moves = self.leave(leaving)
        self._cancelled -= {s.id for s in leaving}
        self._cancelled &= {s.id for s in self.prefilling}
        return moves

    def admit(self, cached: Callable[[Sequence], int] = lambda sequence: 0) -> list[Sequence]:
        """Give free slots to waiting sequences and return them, short prompts first: those start while others are read.

        Args:
            cached: how many tokens of a sequence's prompt need not be read. Prompts are read together that have equally many.
        """
        free = self.max_num_seqs - len(self.running)
        if self.prefilling or not self.waiting or not free:
            return []
        size = 1 if self.one_by_one else free
        known, group = cached(self.waiting[0]), [self.waiting.popleft()]
        while self.waiting and len(group) < size and cached(self.waiting[0]) == known:
            group.append(self.waiting.popleft())
        self.prefilling = sorted(group, key=lambda s: len(s.request.prompt))
        for slot, sequence in enumerate(self.prefilling, start=len(self.running)):
            sequence.slot, sequence.filled, sequence.cached = slot, known, known
        return list(self.prefilling)

    def next_chunk(self) -> Chunk | None:
        """The chunk of prompts to read before the next step, None when there is none."""
        group, budget = self.prefilling, self.max_num_batched_tokens
        if not group:
            return None
        start = group[0].filled
        left = group[-1].to_fill - start
        length = budget if self.one_by_one else min(left, max(1, budget // len(group)))
        return Chunk(slice(group[0].slot, group[0].slot + len(group)), start, length)

    def was_read(self, chunk: Chunk) -> int:
        """Note that a chunk was read; returns the number of prompt tokens in it."""
        tokens = sum(max(0, min(chunk.length, s.to_fill - chunk.start)) for s in self.prefilling)
        for sequence in self.prefilling:
            sequence.filled += chunk.length
        return tokens

    def next_ready(self) -> tuple[Sequence, Move | None] | None:
        """Let the next sequence whose prompt was read run, in the first free slot; None when there is none."""
        if not self.prefilling or self.prefilling[0].filled < self.prefilling[0].to_fill:
            return None
        sequence, target = self.prefilling.pop(0), len(self.running)
        move = None if sequence.slot == target else Move(sequence.slot, target, sequence.length + 1)
        sequence.slot = target
        self.running.append(sequence)
        return sequence, move

    def leave(self, leaving: list[Sequence]) -> list[Move]:
        """Free the slots of some running sequences; the last running ones move into the holes."""
        moves = []
        for sequence in sorted(leaving, key=lambda s: s.slot, reverse=True):
            last = self.running.pop()
            if last is not sequence:
                moves.append(Move(last.slot, sequence.slot, last.length + last.unread))
                last.slot = sequence.slot
                self.running[last.slot] = last
        return moves
