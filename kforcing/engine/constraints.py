"""What the grammars of structured outputs allow, for all slots of a step."""

from __future__ import annotations

import torch
from torch import Tensor

from kforcing.structured import Matcher


class Constraints:
    """The matcher of each slot that has one. It runs on the host, so a step waits for the device at each position."""

    def __init__(self, slots: int, vocabulary: int, device: torch.device):
        self.matchers: list[Matcher | None] = [None] * slots
        self.begin = [0] * slots
        """The column of a slot at which its text begins."""
        self.vocabulary, self.device = vocabulary, device

    def join(self, slot: int, matcher: Matcher | None, begin: int) -> None:
        """Take over the matcher of a request that begins in a slot."""
        self.matchers[slot], self.begin[slot] = matcher, begin

    def move(self, source: int, target: int) -> None:
        """Copy a slot to another one."""
        self.matchers[target], self.begin[target] = self.matchers[source], self.begin[source]

    def keep(self, slots: int) -> None:
        """Forget the matchers of all but the first slots: no request runs there."""
        self.matchers[slots:] = [None] * (len(self.matchers) - slots)

    def allowed(self, tokens_SC: Tensor, end_R: Tensor, more: list[Tensor]) -> Tensor | None:
        """(R, V) bool: what may follow the columns before `end_R` and then the tokens `more`, (R,) each.

        None when no slot has a matcher. Slots without one, and ends inside of a prompt (or −1), allow everything.
        """
        R = len(end_R)
        if not any(self.matchers[:R]):
            return None
        allowed_RV = torch.ones(R, self.vocabulary, dtype=torch.bool)
        behind = torch.stack(more, dim=1).tolist() if more else [[]] * R
        for slot, (end, tokens) in enumerate(zip(end_R.tolist(), behind, strict=True)):
            matcher, begin = self.matchers[slot], self.begin[slot]
            if matcher and end >= begin:
                allowed_RV[slot] = matcher.allowed(tokens_SC[slot, begin:end].tolist() + tokens)
        return allowed_RV.to(self.device)
