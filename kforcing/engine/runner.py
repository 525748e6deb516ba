"""The model runner: one step for all slots, a function of tensors alone, so that it can be compiled or captured as a graph.

A step reads the last P tokens of every slot, which the trunk has not read yet, and writes a block of K new tokens:

    tokens      … t-3 t-2 t-1 t | n1 n2 n3 n4          the slot's row, one column a position
    step        the trunk reads [t-3 … t] (their keys and values stay), the read-out makes n1 … n4

*Fixed* slots keep all of a block. In *exact* slots only n1, the AR model's own token, is final; n2 … are drafts. The next
step reads the block, and the trunk's states at its tokens say which token the AR model draws behind each of them under the
noise of that position. Drafts are kept as far as they equal those tokens. At the first difference the AR model's token takes
the draft's place and is the first token of the next block, which overwrites what was rejected:

    drafts      … t | n1 d2 d3 d4       AR's own: behind n1 e2 = d2, behind d2 e3 ≠ d3
    next block  … t | n1 d2 | e3 d4' …  e3 is final, the block after it is new

Verified tokens are those that AR decoding gives, whatever the drafts: a draft changes nothing but the number of steps.
Drafts come from the student, or from an earlier occurrence of the slot's last tokens (`drafts.py`). A step may read fewer
drafts than were made; it forgets the others. A slot whose last block is shorter than P reads some tokens again, which changes
nothing. A prompt shorter than P repeats its first token at the first position, which changes nothing either, because the same
keys are written twice.

Shapes: S slots, R the slots of a step, P tokens read, K tokens made, C columns, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kforcing.attention.reader import Reader
from kforcing.attention.windows import Windows
from kforcing.backbone import embeddings, head, key_heads, lm_head
from kforcing.coupling import Coupling
from kforcing.engine.cache import SlotCache
from kforcing.engine.constraints import Constraints
from kforcing.engine.drafts import DraftSources, find_drafts
from kforcing.engine.layers import Stack, build_stack
from kforcing.engine.request import Request
from kforcing.engine.sampler import Sampler, log_probabilities
from kforcing.keys import derive_key
from kforcing.noise import uniform
from kforcing.readout.base import Pick, Turn, as_student


class StepShape(NamedTuple):
    """The sizes of a step and the parts it has. A CUDA graph belongs to each."""

    slots: int
    """R, the first slots."""
    columns: int
    """Columns of the cache that attention looks at: those in use, or more."""
    read: int
    """P, tokens at the end of each slot that the trunk reads."""
    width: int
    """K, tokens of the new block."""
    plain: bool
    """No slot has sampling options beyond a temperature."""
    verify: bool
    """Some slot has drafts to verify."""
    context: bool = False
    """Some slot takes drafts from its context."""
    masked: bool = True
    """False when all slots use exactly `columns` columns and one token is read."""
    logprobs: int | None = None
    """N, how many likeliest tokens are returned with log-probabilities; None when no slot asks for any."""
    light: bool = False
    """All slots verify, and the drafts are those of the light read-out."""
    unfiltered: bool = False
    """`light`, and no slot has options beyond a temperature, which may be 0: drafts need no logits over the vocabulary."""


class ARReadout:
    """Plain AR decoding as a read-out of one token: the baseline that shares everything else."""

    def __init__(self, coupling: Coupling):
        self.coupling = coupling

    def turns(
        self, backbone: PreTrainedModel, windows: Windows, reader: Reader, known_BWD: Tensor | None, pick: Pick
    ) -> Iterator[Turn]:
        """See `Readout.turns`."""
        assert windows.prefix_BWP is not None
        logits_BWV = lm_head(backbone, reader.read(embeddings(backbone)(windows.prefix_BWP))[:, :, -1])
        yield logits_BWV, pick(logits_BWV, 0)

    def pick(self, logits: Tensor, z: Tensor, temperature: Tensor | float) -> Tensor:
        """The coupled draw."""
        return self.coupling(logits.float(), z, temperature)


class SlotReader:
    """A `Reader` of one window a slot, on the slot cache: entries follow each other from `start_R` on."""

    def __init__(self, runner: ModelRunner, stack: nn.Module, start_R: Tensor, columns: int, masked: bool):
        self.runner, self.stack, self.start_R, self.columns, self.masked = runner, stack, start_R, columns, masked
        self.length = 0

    def fork(self, stack: nn.Module, depth: int) -> SlotReader:
        """See `Reader.fork`. The stack was placed above the last layers of the cache when the runner was built."""
        other = SlotReader(self.runner, stack, self.start_R, self.columns, self.masked)
        other.length = self.length
        return other

    def read(self, block_BWLD: Tensor) -> Tensor:
        """See `Reader.read`."""
        block_RLD = block_BWLD[:, 0]
        R, L, _ = block_RLD.shape
        offsets_L = torch.arange(self.length, self.length + L, device=block_RLD.device)
        positions_RL = (self.start_R[:, None] + offsets_L).clamp_(min=0)
        self.length += L
        span = self.runner.cache.span(slice(0, R), positions_RL, self.columns, self.masked)
        return self.runner.stacks[self.stack](block_RLD, span)[:, None]


class ModelRunner:
    """Weights, cache and the state of all slots on the device. Knows nothing of requests beyond their tensors.

    Args:
        model: a student, or any causal LM for AR decoding by `coupling`.
        slots, max_model_len, k: the step's shape and the longest request; there are max_model_len + k columns.
        compiled: run the layers through `torch.compile`.
        context_ngram: tokens that must agree at most where drafts are taken from the context.
        drafter: a light copy of a sequential student's read-out, for drafts that are verified.
    """

    def __init__(
        self,
        model: nn.Module,
        slots: int,
        max_model_len: int,
        k: int,
        coupling: Coupling,
        compiled: bool,
        context_ngram: int = 0,
        drafter: nn.Module | None = None,
    ):
        backbone: Any = model
        self.readout: Any = ARReadout(coupling)
        self.makes_blocks = self.has_hints = False
        """Whether the model makes drafts, and whether a step of one token has a hint beside the tokens that it reads."""
        if student := as_student(model):
            self.makes_blocks = True
            backbone, self.readout = student.backbone, student.readout
            self.has_hints = not student.design.conditional
        self.backbone = backbone
        self.slots, self.max_model_len, self.k = slots, max_model_len, k
        trunk: nn.Module = backbone.base_model
        device, dtype = backbone.device, backbone.dtype
        columns = max_model_len + k
        self.cache = SlotCache(backbone.config.num_hidden_layers, slots, columns, *key_heads(backbone), dtype, device)
        self.stacks: dict[nn.Module, Stack] = {trunk: build_stack(trunk, self.cache)}
        self.drafter: Any = drafter
        readouts: list[Any] = [self.readout, drafter]
        for readout in readouts:
            if hasattr(readout, "layers"):
                self.stacks[readout.layers] = build_stack(readout.layers, self.cache)
        if compiled:
            self.stacks = {model: torch.compile(stack, dynamic=True) for model, stack in self.stacks.items()}
        vocabulary = head(backbone).weight.shape[0]
        self.sampler = Sampler(slots, vocabulary, self.readout, device)
        self.constraints = Constraints(slots, vocabulary, device)
        self.tokens_SC = torch.zeros(slots, columns, dtype=torch.int64, device=device)
        self.noise_SC = torch.full((slots, columns), 0.5, dtype=torch.float64, device=device)
        self.length_S = torch.ones(slots, dtype=torch.int64, device=device)
        self.stride_S = torch.full((slots,), k, device=device)
        self.exact_S = torch.zeros(slots, dtype=torch.bool, device=device)
        self.drafted_S = torch.zeros(slots, dtype=torch.int64, device=device)
        self.context_ngram = context_ngram
        self.sources = DraftSources(slots, context_ngram, k - 1, device)

    def load(self, slot: int, prompt: list[int]) -> None:
        """Put a prompt into a slot, where it will be read."""
        self.tokens_SC[slot, : len(prompt)] = torch.tensor(prompt, device=self.tokens_SC.device)
        # Steps of other requests may cover the slot while the prompt is read. Without drafts they write behind it only.
        self.length_S[slot] = len(prompt)
        self.exact_S[slot] = False
        self.drafted_S[slot] = 0

    def start(self, slot: int, request: Request, k: int, exact: bool) -> None:
        """Let a request whose prompt was read run, with at most k tokens a step."""
        length = len(request.prompt)
        columns_C = torch.arange(self.cache.columns, device=self.tokens_SC.device)
        zero = torch.zeros(1, dtype=torch.int64, device=columns_C.device)
        self.noise_SC[slot] = uniform(derive_key(request.seed, "decode"), zero, 0, columns_C)
        self.length_S[slot] = length
        self.stride_S[slot] = k
        self.exact_S[slot] = exact
        self.drafted_S[slot] = 0
        self.sources.join(slot)
        self.sampler.join(slot, request.sampling, self.tokens_SC[slot, :length], request.stop_ids)
        self.constraints.join(slot, request.grammar.matcher() if request.grammar else None, length)

    def move(self, source: int, target: int, columns: int) -> None:
        """Copy a request to another slot, whose first `columns` columns it needs."""
        self.cache.move(source, target, columns)
        slots = (self.tokens_SC, self.noise_SC, self.length_S, self.stride_S, self.exact_S, self.drafted_S)
        for state in (*slots, *self.sources.state):
            state[target] = state[source]
        self.sampler.move(source, target)
        self.constraints.move(source, target)

    def prefill(self, slots: slice, start: int, length: int) -> Tensor:
        """Read the positions from `start` on of consecutive slots; what lies beyond a prompt is overwritten later.

        Returns:
            (R, length, D) states of the trunk.
        """
        at_L = torch.arange(start, start + length, device=self.tokens_SC.device).clamp_(max=self.cache.columns - 2)
        ids_RL = self.tokens_SC[slots][:, at_L]
        span = self.cache.span(slots, at_L.expand(ids_RL.shape), min(start + length, self.cache.columns))
        states_RLD: Tensor = self.stacks[self.backbone.base_model](embeddings(self.backbone)(ids_RL), span)
        return states_RLD

    def score_prompt(self, slot: int, start: int, states_LD: Tensor, n: int) -> Tensor:
        """(L, 1 + 2n) `log_probabilities` of a prompt's tokens behind those from `start` on, which have these states."""
        ids_L = self.tokens_SC[slot, start + 1 : start + 1 + len(states_LD)]
        return log_probabilities(lm_head(self.backbone, states_LD), ids_L, n)

    def step(self, shape: StepShape) -> Tensor:
        """Advance the first R slots.

        Returns:
            (R, 4 + k) int64: the number of tokens that became final in this step, how many drafts were verified, the source
            of the new drafts (see `DraftSources`) and their number; then the final tokens, then anything. With
            log-probabilities (R, 4 + k + k · (1 + 2N)): behind the tokens, the bits of `log_probabilities` of each.
        """
        R, P = shape.slots, shape.read
        if shape.context:
            self._forget_drafts(R, P - 1)
        # An empty slot that steps along stays within its columns: its length would go on growing.
        beyond_R = (self.length_S[:R] - self.drafted_S[:R] - (self.max_model_len - 1)).clamp_(min=0)
        start_R = self.length_S[:R] - beyond_R - P
        tokens_RP = self._at(self.tokens_SC, start_R, P)
        known_R = P - self.drafted_S[:R]
        # (R, L, 1 + 2N) log-probabilities: with verification of AR's own tokens, then of the block's other ones.
        records: list[Tensor] = []
        reader = SlotReader(self, self.backbone.base_model, start_R, shape.columns, shape.masked)
        if shape.verify:
            accepted_R, trunk_RD, first_R = self._verify(reader, shape, start_R, tokens_RP, known_R, records)
            end_R = (start_R + accepted_R).clamp(max=self.max_model_len - 1)
            # The next block begins behind the last accepted token, and its hints overwrite the rejected drafts.
            reader = SlotReader(self, self.backbone.base_model, end_R, shape.columns, masked=True)
            made_RK = self._block(reader, end_R, shape, records, trunk_RD=trunk_RD, first_R=first_R)
        else:
            accepted_R = torch.full_like(start_R, P)
            end_R = self.length_S[:R].clamp(max=self.max_model_len - 1)
            made_RK = self._block(reader, end_R, shape, records, tokens_RP=tokens_RP)
        self._write(end_R, made_RK)
        return self._advance(shape, end_R, known_R, accepted_R, tokens_RP, made_RK, records)

    def _advance(
        self,
        shape: StepShape,
        end_R: Tensor,
        known_R: Tensor,
        accepted_R: Tensor,
        tokens_RP: Tensor,
        made_RK: Tensor,
        records: list[Tensor],
    ) -> Tensor:
        """Move lengths and counts forward and choose the drafts; returns what `step` returns."""
        R, P = tokens_RP.shape
        stride_R = self.stride_S[:R].clamp(max=shape.width)
        kept_R = torch.where(self.exact_S[:R], 1, stride_R)
        if not shape.plain:
            read_P, made_K = (torch.arange(n, device=end_R.device) for n in (P, made_RK.shape[1]))
            self.sampler.count(tokens_RP, (read_P >= known_R[:, None]) & (read_P < accepted_R[:, None]))
            self.sampler.count(made_RK, made_K < kept_R[:, None])
        verified_R, new_R = P - known_R, accepted_R - known_R + kept_R
        final_RK = self._final(known_R, accepted_R, tokens_RP, made_RK)
        extras = [] if shape.logprobs is None else [self._final_records(shape, known_R, accepted_R, records)]
        drafted_R, source_R = stride_R - kept_R, torch.zeros_like(new_R)
        if shape.context:
            self.sources.judge(verified_R, new_R, final_RK)
            drafted_R, source_R = self._draft(shape, end_R, made_RK, drafted_R)
        self.length_S[:R].copy_(end_R + kept_R + drafted_R)
        self.drafted_S[:R].copy_(drafted_R)
        return torch.cat([torch.stack([new_R, verified_R, source_R, drafted_R], dim=1), final_RK, *extras], dim=1)

    def _forget_drafts(self, R: int, most: int) -> None:
        """Keep so many drafts of each slot."""
        excess_R = (self.drafted_S[:R] - most).clamp_(min=0)
        self.length_S[:R] -= excess_R
        self.drafted_S[:R] -= excess_R

    def _verify(
        self,
        reader: SlotReader,
        shape: StepShape,
        start_R: Tensor,
        tokens_RP: Tensor,
        known_R: Tensor,
        records: list[Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Read the tokens; returns how many are accepted (R,), the trunk's state at the last of them, and AR's next token."""
        R, P = tokens_RP.shape
        states_RPD = reader.read(embeddings(self.backbone)(tokens_RP[:, None]))[:, 0]
        drafted_RP = torch.arange(P, device=start_R.device) >= known_R[:, None]
        noise_RP = self._at(self.noise_SC, start_R + 1, P)
        logits_RPV = lm_head(self.backbone, states_RPD)

        def allowed(i: int) -> Tensor | None:
            end_R = torch.where(known_R <= i + 1, start_R + i + 1, -1)  # what follows a token before is known
            return self.constraints.allowed(self.tokens_SC, end_R, [])

        own_RP = self.sampler.along_drafts(
            logits_RPV, noise_RP, tokens_RP, drafted_RP, None if shape.plain else allowed
        )
        if shape.logprobs is not None:
            records.append(log_probabilities(logits_RPV, own_RP, shape.logprobs))
        agrees_RP = torch.cat([torch.ones_like(drafted_RP[:, :1]), own_RP[:, :-1] == tokens_RP[:, 1:]], dim=1)
        accepted_R = (agrees_RP | ~drafted_RP).long().cumprod(dim=1).sum(dim=1)
        last_R1 = accepted_R[:, None] - 1
        trunk_RD = states_RPD.gather(1, last_R1[..., None].expand(R, 1, states_RPD.shape[-1]))[:, 0]
        return accepted_R, trunk_RD, own_RP.gather(1, last_R1)[:, 0]

    def _block(
        self,
        reader: SlotReader,
        end_R: Tensor,
        shape: StepShape,
        records: list[Tensor],
        tokens_RP: Tensor | None = None,
        trunk_RD: Tensor | None = None,
        first_R: Tensor | None = None,
    ) -> Tensor:
        """(R, K) new tokens at the positions from `end_R` on.

        They follow the tokens `tokens_RP`, which are read here, or a trunk state that was read already with its token.
        """
        R, K = shape.slots, shape.width if self.makes_blocks else 1
        noise_RK = self._at(self.noise_SC, end_R, K)
        windows = Windows(
            context_BN=self.tokens_SC[:R],
            anchors_BW=end_R[:, None] - 1,
            noise_BWK=noise_RK[:, None],
            temperature_B=self.sampler.temperature_S[:R],
            prefix_BWP=None if tokens_RP is None else tokens_RP[:, None],
        )
        counts_RV = None if shape.plain else self.sampler.counts_SV[:R].clone()
        before = [] if first_R is None else [first_R]

        def pick(logits_BWV: Tensor, offset: int) -> Tensor:
            allowed_RV = None if shape.plain else self.constraints.allowed(self.tokens_SC, end_R, before)
            token_R = self.sampler(logits_BWV[:, 0], noise_RK[:, offset], counts_RV, allowed_RV)
            before.append(token_R)
            if counts_RV is not None:
                counts_RV.scatter_add_(1, token_R[:, None], torch.ones_like(token_R, dtype=counts_RV.dtype)[:, None])
            return token_R[:, None]

        if first_R is None:
            turns = self.readout.turns(self.backbone, windows, reader, None, pick)
            return self._tokens(turns, shape, records)
        assert trunk_RD is not None
        if K == 1:
            return first_R[:, None]
        if counts_RV is not None:
            counts_RV.scatter_add_(1, first_R[:, None], torch.ones_like(first_R, dtype=counts_RV.dtype)[:, None])
        readout = self.drafter if shape.light else self.readout
        # Without candidates a greedy draft is an argmax, which takes less time than a draw.
        own = None if shape.unfiltered and (shape.plain or readout.config.draft_rank) else pick
        turns = readout.drafts(self.backbone, windows, reader, trunk_RD[:, None], first_R[:, None], own)
        return torch.cat([first_R[:, None], self._tokens(turns, shape, records)], dim=1)

    def _tokens(self, turns: Iterator[Turn], shape: StepShape, records: list[Tensor]) -> Tensor:
        """(R, L) tokens of the turns, whose log-probabilities are noted where a slot asks for them."""
        tokens = []
        for logits_RWV, token_RW in turns:
            tokens.append(token_RW)
            if shape.logprobs is not None:
                records.append(log_probabilities(logits_RWV, token_RW, shape.logprobs))
        return torch.cat(tokens, dim=1)

    def _final(self, known_R: Tensor, accepted_R: Tensor, read_RP: Tensor, made_RK: Tensor) -> Tensor:
        """(R, k) tokens: the accepted drafts of each slot, then its new block, then anything.

        They do not come from the slot: behind its last column, the block overwrites drafts that were accepted.
        """
        both_RL = torch.cat([read_RP, made_RK], dim=1)
        at_RK = known_R[:, None] + torch.arange(self.k, device=known_R.device)
        at_RK = torch.where(at_RK < accepted_R[:, None], at_RK, at_RK + (read_RP.shape[1] - accepted_R)[:, None])
        return both_RL.gather(1, at_RK.clamp_(max=both_RL.shape[1] - 1))

    def _final_records(self, shape: StepShape, known_R: Tensor, accepted_R: Tensor, records: list[Tensor]) -> Tensor:
        """(R, k · (1 + 2N)) log-probabilities of the tokens of `_final`, as their bits.

        The AR model's own token behind token i of those that were read has record i. Without verification there are
        records of the new block alone.
        """
        records_RLN = torch.cat(records, dim=1)
        rows_RL = torch.arange(records_RLN.shape[1], device=known_R.device).expand(shape.slots, -1)
        own = shape.read if shape.verify else 0
        first_R, last_R = (known_R - 1, accepted_R) if shape.verify else (0 * known_R, 0 * known_R)
        at_RK = self._final(first_R, last_R, rows_RL[:, :own], rows_RL[:, own:])
        final_RKN = records_RLN.gather(1, at_RK[..., None].expand(-1, -1, records_RLN.shape[-1]))
        return final_RKN.flatten(1).view(torch.int64)

    def _draft(self, shape: StepShape, end_R: Tensor, made_RK: Tensor, drafted_R: Tensor) -> tuple[Tensor, Tensor]:
        """Put drafts from the context behind token 1 of exact slots, where they are better than the student's.

        Args:
            drafted_R: how many drafts each slot takes.
        Returns:
            (R,) how many there are for it, and (R,) their source.
        """
        R, K = shape.slots, shape.width
        row_RC = self.tokens_SC[:R, : min(shape.columns + 1, self.cache.columns)]
        drafts_RJ, source_R = find_drafts(row_RC, end_R, self.context_ngram, K - 1)
        if self.makes_blocks:
            drafts_RJ, source_R = self.sources.choose(made_RK[:, 1:], drafts_RJ, source_R)
        else:
            drafted_R = torch.where(source_R > 0, drafted_R, 0)
        block_RK = torch.cat([made_RK[:, :1], drafts_RJ], dim=1)
        if self.makes_blocks:
            block_RK = torch.where(self.exact_S[:R, None], block_RK, made_RK)
        self._write(end_R, block_RK)
        return drafted_R, source_R

    def _write(self, end_R: Tensor, made_RK: Tensor) -> None:
        """Put a block at the positions from `end_R` on."""
        at_RK = end_R[:, None] + torch.arange(made_RK.shape[1], device=end_R.device)
        self.tokens_SC[: len(end_R)].scatter_(1, at_RK, made_RK)

    def step_state(self) -> list[Tensor]:
        """The tensors that a step changes, without the cache."""
        return [self.tokens_SC, self.length_S, self.drafted_S, self.sampler.counts_SV, *self.sources.state]

    def _at(self, state_SC: Tensor, start_R: Tensor, n: int) -> Tensor:
        """(R, n) entries of the first R slots, at n columns from `start_R` on, within the columns that there are."""
        columns_RN = start_R[:, None] + torch.arange(n, device=start_R.device)
        return state_SC[: len(start_R)].gather(1, columns_RN.clamp_(min=0, max=self.cache.columns - 1))
