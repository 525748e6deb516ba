"""Drafts from the context: where the last tokens of a slot occurred before, the tokens that followed are the draft.

    slot      … the red fox  … and the red | fox …
                        └──── occurred ─┘    └─ draft

This is prompt lookup decoding as one search over all slots. It needs no training and serves any causal LM. Beside a student,
each slot takes in each step the drafts of the source of which it has accepted more lately.

Shapes: S slots, R the slots of a step, C columns, J drafts of a block, N tokens of a match at most.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

MEMORY = 0.2
"""Weight of the newest block in a slot's running number of accepted drafts."""


def find_drafts(tokens_RC: Tensor, end_R: Tensor, longest: int, count: int) -> tuple[Tensor, Tensor]:
    """The tokens that followed the longest earlier occurrence of the last tokens, the latest one of equally long ones.

    Args:
        tokens_RC: int64; a slot's tokens are those up to and including column `end_R`.
        end_R: int64, column of the last token.
        longest: tokens of a match at most.
        count: J, the number of drafts. Where fewer than J tokens follow the occurrence, they are repeated.
    Returns:
        (R, J) int64 drafts, and (R,) int64, how many tokens the occurrence matches: 0 to N. Without a match they repeat the
        slot's tokens.
    """
    C = tokens_RC.shape[1]
    columns_C = torch.arange(C, device=end_R.device)
    same_RC = columns_C < end_R[:, None]
    rank_RC = columns_C.where(same_RC, -1)  # longer matches rank first, then later ones
    for i in range(min(longest, C)):
        last_R1 = tokens_RC.gather(1, (end_R[:, None] - i).clamp(min=0))
        same_RC = same_RC & pad(tokens_RC[:, : C - i] == last_R1, (i, 0))
        rank_RC = rank_RC + C * same_RC
    best_R1 = rank_RC.amax(dim=1, keepdim=True).clamp_(min=0)
    at_R1 = best_R1 % C
    following_RJ = at_R1 + 1 + torch.arange(count, device=end_R.device) % (end_R[:, None] - at_R1).clamp(min=1)
    return tokens_RC.gather(1, following_RJ.clamp_(max=C - 1)), best_R1[:, 0] // C


class DraftSources:
    """What each source of drafts has brought to each slot: source 0 is the student, n is a match of n tokens.

    Of two sources that have drafts the one is taken whose drafts were accepted more often. Both are held against the tokens
    that turn out to be the AR model's own, so a source that is not taken is still judged. The choice depends on the slot's
    own request alone.
    """

    def __init__(self, slots: int, ngram: int, drafts: int, device: torch.device):
        self.rate_SN = torch.zeros(slots, 1 + ngram, device=device)
        self.source_S = torch.zeros(slots, dtype=torch.int64, device=device)
        self.spare_S = torch.full((slots,), -1, device=device)
        self.spare_SJ = torch.zeros(slots, drafts, dtype=torch.int64, device=device)

    @property
    def state(self) -> list[Tensor]:
        """The tensors that a step changes."""
        return [self.rate_SN, self.source_S, self.spare_S, self.spare_SJ]

    def join(self, slot: int) -> None:
        """Forget the request that was in a slot."""
        self.rate_SN[slot] = 0
        self.spare_S[slot] = -1

    def judge(self, verified_R: Tensor, new_R: Tensor, final_RK: Tensor) -> None:
        """Note the final tokens behind the first of each slot's block, of which `verified_R` drafts were verified."""
        R, J = len(new_R), self.spare_SJ.shape[1]
        places_J = torch.arange(J, device=new_R.device)
        known_RJ = places_J < torch.minimum(verified_R, new_R)[:, None]
        right_R = ((self.spare_SJ[:R] == final_RK[:, :J]) & known_RJ).long().cumprod(dim=1).sum(dim=1)
        self._note(self.source_S[:R], new_R - 1, verified_R > 0)
        self._note(self.spare_S[:R].clamp(min=0), right_R, (verified_R > 0) & (self.spare_S[:R] >= 0))

    def _note(self, source_R: Tensor, right_R: Tensor, seen_R: Tensor) -> None:
        rates_RN = self.rate_SN[: len(source_R)]
        rate_R1 = rates_RN.gather(1, source_R[:, None])
        rates_RN.scatter_(1, source_R[:, None], rate_R1 + MEMORY * seen_R[:, None] * (right_R[:, None] - rate_R1))

    def choose(self, own_RJ: Tensor, found_RJ: Tensor, matched_R: Tensor) -> tuple[Tensor, Tensor]:
        """The student's (R, J) drafts or those found in the context, for each slot; and (R,) their source."""
        R, J = own_RJ.shape
        rates_RN = self.rate_SN[:R]
        better_R = rates_RN.gather(1, matched_R[:, None])[:, 0] > rates_RN[:, 0]
        self.source_S[:R] = torch.where(better_R, matched_R, 0)
        self.spare_S[:R] = torch.where(better_R, 0, torch.where(matched_R > 0, matched_R, -1))
        self.spare_SJ[:R, :J] = torch.where(better_R[:, None], own_RJ, found_RJ)
        return torch.where(better_R[:, None], found_RJ, own_RJ), self.source_S[:R].clone()
