"""The sequential read-out: an exact AR trunk, parallel hints, and a small head that makes tokens depend on each other.

    trunk     the AR model. It reads the context and committed tokens only, and its own LM head gives token 1 exactly.
    hints     K−1 learned queries at positions t+1 … t+K−1. Their layers see the keys and values of the trunk and the earlier
              hints of their window. Their states describe the block before its tokens are known.
    head      one transformer block. It reads the trunk's state, and then for each token that was made the trunk's state, the
              state of the next hint and the embedding of the token. It corrects the state of the hint, K−1 times.

A coupling draws each token from its distribution outside the network, so temperatures and log-probabilities are those of the
distributions. The step is still a push-forward map from k noise variables to k tokens.

Shapes: B batch, W windows, K tokens of a block, H = K − 1 hints, D width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kforcing.attention.reader import Reader
from kforcing.attention.windows import Context, Windows
from kforcing.backbone import check_head_rows, embeddings, head, head_rows, lm_head
from kforcing.chunking import CHUNK, in_chunks
from kforcing.coupling import Candidates, Coupling, gumbel_candidates
from kforcing.design import SequentialConfig
from kforcing.readout.base import BlockScores, Pick, Readout, Turn, open_windows
from kforcing.readout.head_block import HeadBlock, Past
from kforcing.readout.hint_layers import hint_stack
from kforcing.readout.low_rank_head import LowRankHead


@dataclass(frozen=True)
class Draws:
    """What the tokens of some windows are drawn with; `Windows` has it too."""

    noise_BWK: Tensor
    temperature_BW: Tensor


class SequentialReadout(Readout):
    """The read-out of the sequential recipe: token 1 from the exact AR trunk, tokens 2 … K from hints and the small head.

    Args:
        backbone: the AR model, which the caller owns.
        k: tokens of a block at most.
        config: parts and sizes.
        coupling: draws each token from its distribution.
    Raises:
        ValueError: when the embeddings and the LM head have different widths, or the hint layers cannot be built.
    """

    def __init__(self, backbone: PreTrainedModel, k: int, config: SequentialConfig, coupling: Coupling):
        super().__init__()
        self.config, self.coupling = config, coupling
        width = embeddings(backbone).weight.shape[1]
        if head(backbone).weight.shape[1] != width:
            raise ValueError(
                f"{type(backbone).__name__} has embeddings and a head of different widths; they must agree"
            )
        if config.draft_rank:
            check_head_rows(backbone, f"draft_rank={config.draft_rank}")
        elif config.shortlist:
            check_head_rows(backbone, f"shortlist={config.shortlist}", without_bias=False)
        if config.hints != "none":
            self.layers = hint_stack(backbone.base_model, config)
            self.queries = nn.Embedding(max(k - 1, 1), width)
            if not self.queries.weight.is_meta:  # loading builds the model without data
                nn.init.normal_(self.queries.weight, std=embeddings(backbone).weight.std().item())
        if config.draft_rank:
            self.candidates = LowRankHead(width, head(backbone).weight.shape[0], config.draft_rank)
        if config.draft == "bigram":
            self.bigram = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width))
        self.token_norm = nn.LayerNorm(width)
        self.entry = nn.Linear(3 * width, width)
        self.positions = nn.Embedding(k, width)
        nn.init.normal_(self.positions.weight, std=0.02)
        self.block = HeadBlock(width, math.gcd(width, backbone.config.num_attention_heads))
        self.norm = nn.LayerNorm(width)
        self.correct = nn.Linear(width, width)

    def start(self, backbone: PreTrainedModel) -> None:
        """Set the corrections of the head to zero, so that the hints alone give the logits at first."""
        nn.init.zeros_(self.correct.weight)
        nn.init.zeros_(self.correct.bias)

    def grow(self, k: int) -> None:
        """Implements `Readout.grow`. New hints and places in the block begin as copies of the last ones."""
        self.positions = _extended(self.positions, k)
        if self.config.hints != "none":
            self.queries = _extended(self.queries, max(k - 1, 1))

    @property
    def hint_shortlist(self) -> bool:
        """Whether the hints' own logits choose the shortlist, and are trained for it."""
        return self.config.shortlist > 0 and not self.config.draft_rank

    def pick(self, logits: Tensor, z: Tensor, temperature: Tensor | float) -> Tensor:
        """Draw a token by the coupling: (..., V) logits and (...) noise → (...) int64 ids."""
        return self.coupling(logits.float(), z, temperature)

    def scores(
        self, backbone: PreTrainedModel, windows: Windows, tokens_BWK: Tensor, context: Context | None = None
    ) -> BlockScores:
        """Implements `Readout.scores`: p(· | context, tokens before) for every token of the given blocks."""
        context, reader = open_windows(backbone, windows, context)
        trunk_BWD = self._trunk(backbone, windows, reader, context.at(windows.anchors_BW))
        first_BW1D = trunk_BWD[:, :, None]
        if windows.k == 1:
            return BlockScores(first_BW1D, head(backbone))
        drafts, side = self._drafts(backbone, windows, tokens_BWK)
        hints_BWHD = self._hints(backbone, trunk_BWD, reader, drafts, windows.k)
        before_BWHD = embeddings(backbone)(tokens_BWK[..., :-1])
        corrections_BWHD, _ = self._head(trunk_BWD, hints_BWHD, before_BWHD, 1, self._first_entry(trunk_BWD))
        side = (*side, hints_BWHD) if self.hint_shortlist else side
        return BlockScores(torch.cat([first_BW1D, hints_BWHD + corrections_BWHD], dim=2), head(backbone), side)

    def turns(
        self, backbone: PreTrainedModel, windows: Windows, reader: Reader, known_BWD: Tensor | None, pick: Pick
    ) -> Iterator[Turn]:
        """Implements `Readout.turns`: token 1 comes from the trunk, and K−1 turns of the head follow."""
        trunk_BWD = self._trunk(backbone, windows, reader, known_BWD)
        hints_BWHD = parallel_BWHV = None
        if windows.k > 1 and self.hint_shortlist and self.config.draft == "none":
            # The hints do not need token 1, so one pass of the LM head gives its logits and those of all hints.
            hints_BWHD = self._hints(backbone, trunk_BWD, reader, [], windows.k)
            logits_BWKV = lm_head(backbone, torch.cat([trunk_BWD[:, :, None], hints_BWHD], dim=2))
            logits_BWV, parallel_BWHV = logits_BWKV[:, :, 0], logits_BWKV[:, :, 1:]
        else:
            logits_BWV = lm_head(backbone, trunk_BWD)
        token_BW = pick(logits_BWV, 0)
        yield logits_BWV, token_BW
        if windows.k == 1:
            return
        if hints_BWHD is None:
            yield from self.drafts(backbone, windows, reader, trunk_BWD, token_BW, pick)
        else:
            yield from self._later_turns(backbone, windows, trunk_BWD, hints_BWHD, parallel_BWHV, token_BW, pick)

    def drafts(
        self,
        backbone: PreTrainedModel,
        windows: Windows,
        reader: Reader,
        trunk_BWD: Tensor,
        first_BW: Tensor,
        pick: Pick | None,
    ) -> Iterator[Turn]:
        """Tokens 2 … K of each window, given the trunk's state behind its context and token 1.

        `reader` reads hints from the position of token 1 on. Without `pick`, the coupling draws with the windows' noise and
        temperature, and where a low-rank head chooses candidates, the logits of a turn are theirs alone: (B, W, M).
        """
        drafts, _ = self._drafts(backbone, windows, first_BW[..., None])
        hints_BWHD = self._hints(backbone, trunk_BWD, reader, drafts, windows.k)
        yield from self._later_turns(backbone, windows, trunk_BWD, hints_BWHD, None, first_BW, pick)

    def tokens(self, backbone: PreTrainedModel, windows: Windows, context: Context | None = None) -> Tensor:
        """Implements `Readout.tokens`. The head works on a slice of the windows at a time."""
        context, reader = open_windows(backbone, windows, context)
        trunk_BWD = self._trunk(backbone, windows, reader, context.at(windows.anchors_BW))
        trunk_RD, noise_RK = trunk_BWD.flatten(0, 1), windows.noise_BWK.flatten(0, 1)
        temperature_R, shape = windows.temperature_BW.flatten(), windows.noise_BWK.shape
        guess = partial(self._guess, backbone, trunk_RD, noise_RK[:, 0], temperature_R)
        (first_R,) = in_chunks(guess, len(trunk_RD), CHUNK)
        if windows.k == 1:
            return first_R.view(shape)
        drafts, _ = self._drafts(backbone, windows, first_R.view(shape[:2])[..., None])
        hints_RHD = self._hints(backbone, trunk_BWD, reader, drafts, windows.k).flatten(0, 1)

        def later(rows: slice) -> tuple[Tensor, ...]:
            def pick(logits_1RV: Tensor, offset: int) -> Tensor:
                return self.pick(logits_1RV, noise_RK[None, rows, offset], temperature_R[None, rows])

            draws = Draws(noise_RK[None, rows], temperature_R[None, rows])
            turns = self._later_turns(
                backbone, draws, trunk_RD[None, rows], hints_RHD[None, rows], None, first_R[None, rows], pick
            )
            return (torch.cat([token for _, token in turns]).T,)

        (later_RH,) = in_chunks(later, len(trunk_RD), max(1, CHUNK // windows.k))
        return torch.cat([first_R[:, None], later_RH], dim=1).view(shape)

    def _later_turns(
        self,
        backbone: PreTrainedModel,
        draws: Draws | Windows,
        trunk_BWD: Tensor,
        hints_BWHD: Tensor,
        parallel_BWHV: Tensor | None,
        token_BW: Tensor,
        pick: Pick | None,
    ) -> Iterator[Turn]:
        """The turns of the head after token 1; see `drafts`.

        `parallel_BWHV` are the logits of the hints alone, if they exist already.
        """
        if parallel_BWHV is None and self.hint_shortlist:
            parallel_BWHV = lm_head(backbone, hints_BWHD)
        past = self._first_entry(trunk_BWD)
        for j in range(hints_BWHD.shape[2]):
            hint_BW1D = hints_BWHD[:, :, j : j + 1]
            before_BW1D = embeddings(backbone)(token_BW)[:, :, None]
            correction_BW1D, past = self._head(trunk_BWD, hint_BW1D, before_BW1D, j + 1, past)
            if self.config.draft_rank:
                candidates, logits_BWM = self._candidates(
                    backbone, (hint_BW1D + correction_BW1D)[:, :, 0], draws, j + 1
                )
                if pick is None:
                    token_BW = candidates.draw(logits_BWM, draws.temperature_BW)
                    yield logits_BWM, token_BW
                    continue
                nothing_BWV = logits_BWM.new_full((*token_BW.shape, len(head(backbone).weight)), -torch.inf)
                logits_BWV = nothing_BWV.scatter_(-1, candidates.ids, logits_BWM)
            elif parallel_BWHV is None:
                logits_BWV = lm_head(backbone, hint_BW1D + correction_BW1D)[:, :, 0]
            else:
                logits_BWV = self._shortlisted(backbone, parallel_BWHV[:, :, j], correction_BW1D[:, :, 0])
            if pick is None:
                token_BW = self.pick(logits_BWV, draws.noise_BWK[..., j + 1], draws.temperature_BW)
            else:
                token_BW = pick(logits_BWV, j + 1)
            yield logits_BWV, token_BW

    def _trunk(self, backbone: PreTrainedModel, windows: Windows, reader: Reader, known_BWD: Tensor | None) -> Tensor:
        """The trunk's state at the last known token of each window."""
        if windows.prefix_BWP is None:
            assert known_BWD is not None
            return known_BWD
        return reader.read(embeddings(backbone)(windows.prefix_BWP))[:, :, -1]

    def _drafts(
        self, backbone: PreTrainedModel, windows: Windows, tokens_BWK: Tensor
    ) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        """The tokens that the hints see, (B, W) each, and the states of the bigram draft, which training needs.

        The first of these tokens is known; the bigram draft guesses the others.
        """
        if self.config.draft == "none":
            return [], ()
        drafts = [tokens_BWK[..., 0]]
        if self.config.draft == "first":
            return drafts, ()

        def bigram(tokens: Tensor) -> Tensor:
            return self.bigram(embeddings(backbone)(tokens))

        temperature_R, shape = windows.temperature_BW.flatten(), windows.anchors_BW.shape
        with torch.no_grad():
            for j in range(1, windows.k - 1):
                states_RD, noise_R = bigram(drafts[-1]).flatten(0, 1), windows.noise_BWK[..., j].flatten()
                guess = partial(self._guess, backbone, states_RD, noise_R, temperature_R)
                drafts.append(in_chunks(guess, shape.numel(), CHUNK)[0].view(shape))
        return drafts, (bigram(tokens_BWK[..., :-1]),) if torch.is_grad_enabled() else ()

    def _guess(
        self, backbone: PreTrainedModel, states_RD: Tensor, noise_R: Tensor, temperature_R: Tensor, rows: slice
    ) -> tuple[Tensor, ...]:
        return (self.pick(lm_head(backbone, states_RD[rows]), noise_R[rows], temperature_R[rows]),)

    def _hints(
        self, backbone: PreTrainedModel, trunk_BWD: Tensor, reader: Reader, drafts: list[Tensor], k: int
    ) -> Tensor:
        """The final states of the hints, which describe the block before its tokens are known: (B, W, H, D)."""
        if self.config.hints == "none":
            return trunk_BWD[:, :, None].expand(-1, -1, k - 1, -1)
        numbers_H = torch.arange(k - 1, device=trunk_BWD.device)
        inputs = self.queries(numbers_H).expand(*trunk_BWD.shape[:2], -1, -1)
        if drafts:
            seen = embeddings(backbone)(torch.stack(drafts, dim=2))
            inputs = inputs + nn.functional.pad(seen, (0, 0, 0, k - 1 - len(drafts)))
        return reader.fork(self.layers, self.layers.config.num_hidden_layers).read(inputs)

    def _first_entry(self, trunk_BWD: Tensor) -> Past:
        """Keys and values of the head's first entry, which holds the trunk's state alone."""
        nothing = torch.zeros_like(trunk_BWD[:, :, None])
        return self.block.remember(self._entries(trunk_BWD, nothing, nothing, 0))

    def _head(
        self, trunk_BWD: Tensor, hints_BWLD: Tensor, before_BWLD: Tensor, place: int, past: Past
    ) -> tuple[Tensor, Past]:
        """The corrections of the hint states from `place` on, given the tokens before, and the new `Past`."""
        x_TLD, past = self.block(self._entries(trunk_BWD, hints_BWLD, self.token_norm(before_BWLD), place), past)
        return self.correct(self.norm(x_TLD)).view(hints_BWLD.shape), past

    def _entries(self, trunk_BWD: Tensor, hints_BWLD: Tensor, before_BWLD: Tensor, place: int) -> Tensor:
        """The inputs of the head at the places from `place` on: (B·W, L, D)."""
        L = hints_BWLD.shape[2]
        trunk_BWLD = trunk_BWD[:, :, None].expand(-1, -1, L, -1)
        x = self.entry(torch.cat([trunk_BWLD, hints_BWLD, before_BWLD], dim=-1))
        return (x + self.positions(torch.arange(place, place + L, device=x.device))).flatten(0, 1)

    def _candidates(
        self, backbone: PreTrainedModel, states_BWD: Tensor, draws: Draws | Windows, offset: int
    ) -> tuple[Candidates, Tensor]:
        """The tokens that may win under the noise of this offset, and their logits: (B, W, M)."""
        approximate_BWV = self.candidates(states_BWD)
        m = min(self.config.shortlist, approximate_BWV.shape[-1])
        found = gumbel_candidates(approximate_BWV, draws.noise_BWK[..., offset], draws.temperature_BW, m)
        return found, (head_rows(backbone, found.ids).to(states_BWD.dtype) @ states_BWD[..., None]).squeeze(-1)

    @torch.no_grad()
    def fit_candidates(self, backbone: PreTrainedModel, windows: Windows, tokens_BWK: Tensor) -> None:
        """Set the low-rank head that chooses candidates from the student's own states on some windows.

        Args:
            windows: with several times as many tokens as the model is wide.
            tokens_BWK: int64, the tokens of their blocks.
        """
        states_SD = self.scores(backbone, windows, tokens_BWK).states_BWKD[:, :, 1:].flatten(0, 2)
        self.candidates.fit(head(backbone).weight, states_SD)

    def _shortlisted(self, backbone: PreTrainedModel, parallel: Tensor, corrections: Tensor) -> Tensor:
        """The logits of the hints, corrected for the tokens of the shortlist and −inf for all others: (..., V)."""
        best, ids = parallel.topk(min(self.config.shortlist, parallel.shape[-1]), dim=-1)
        rows = head_rows(backbone, ids).to(corrections.dtype)
        corrected = best + (rows @ corrections[..., None]).squeeze(-1)
        return torch.full_like(parallel, -torch.inf).scatter(-1, ids, corrected)


def _extended(table: nn.Embedding, n: int) -> nn.Embedding:
    """An embedding of n rows: those of the table, with the last one repeated as often as needed."""
    rows = table.weight.detach()
    rows = torch.cat([rows, rows[-1:].expand(max(0, n - len(rows)), -1)])[:n]
    return nn.Embedding.from_pretrained(rows.clone(), freeze=False)
