"""One step for all slots: a pure function of the tensors held here, so that it can be compiled or captured as a graph.

A step feeds every slot its last k tokens and fresh noise, and writes the k tokens it makes behind them:

    tokens      … t-3 t-2 t-1 t | n1 n2 n3 n4          the slot's row, one column a position
    step        the trunk reads [t-3 … t] (their keys and values stay), the read-out makes n1 … n4

A request that takes k' < k tokens a step reads some of the last k again, which changes nothing. A prompt shorter than k
repeats its first token at the first position, which changes nothing either: the same keys are written twice.

Shapes: S slots, R the slots of a step, P = K tokens of a step, C columns, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kforcing.attention.reader import Reader
from kforcing.attention.windows import Windows
from kforcing.backbone import embeddings, head, key_heads, lm_head
from kforcing.coupling import Coupling
from kforcing.engine.cache import SlotCache
from kforcing.engine.layers import Stack, build_stack
from kforcing.engine.request import SamplingParams
from kforcing.engine.sampler import Sampler
from kforcing.noise import derive_key, uniform
from kforcing.readout.base import Pick, Turn, as_student


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
    """

    def __init__(
        self,
        model: nn.Module,
        slots: int,
        max_model_len: int,
        k: int,
        coupling: Coupling,
        compiled: bool,
    ):
        backbone: Any = model
        self.readout: Any = ARReadout(coupling)
        self.hints = 0
        if student := as_student(model):
            backbone, self.readout = student.backbone, student.readout
            self.hints = 0 if k == 1 and student.design.conditional else k
        self.backbone = backbone
        self.slots, self.max_model_len, self.k = slots, max_model_len, k
        trunk: nn.Module = backbone.base_model
        device, dtype = backbone.device, backbone.dtype
        columns = max_model_len + k
        self.cache = SlotCache(backbone.config.num_hidden_layers, slots, columns, *key_heads(backbone), dtype, device)
        self.stacks: dict[nn.Module, Stack] = {trunk: build_stack(trunk, self.cache)}
        if hasattr(self.readout, "layers"):
            self.stacks[self.readout.layers] = build_stack(self.readout.layers, self.cache)
        if compiled:
            self.stacks = {model: torch.compile(stack, dynamic=True) for model, stack in self.stacks.items()}
        vocabulary = head(backbone).weight.shape[0]
        self.sampler = Sampler(slots, vocabulary, self.readout.pick, device)
        self.tokens_SC = torch.zeros(slots, columns, dtype=torch.int64, device=device)
        self.noise_SC = torch.full((slots, columns), 0.5, dtype=torch.float64, device=device)
        self.length_S = torch.ones(slots, dtype=torch.int64, device=device)
        self.stride_S = torch.full((slots,), k, device=device)

    def load(self, slot: int, prompt: list[int]) -> None:
        """A prompt takes a slot, to be read."""
        self.tokens_SC[slot, : len(prompt)] = torch.tensor(prompt, device=self.tokens_SC.device)
        self.length_S[slot] = len(prompt)  # steps may run over the slot; they write behind this only

    def start(self, slot: int, length: int, seed: int, k: int, sampling: SamplingParams) -> None:
        """The request whose prompt of this length was read begins to run."""
        columns_C = torch.arange(self.cache.columns, device=self.tokens_SC.device)
        zero = torch.zeros(1, dtype=torch.int64, device=columns_C.device)
        self.noise_SC[slot] = uniform(derive_key(seed, "decode"), zero, 0, columns_C)
        self.length_S[slot] = length
        self.stride_S[slot] = k
        self.sampler.join(slot, sampling)

    def move(self, source: int, target: int, columns: int) -> None:
        """A request changes its slot."""
        self.cache.move(source, target, columns)
        for state in (self.tokens_SC, self.noise_SC, self.length_S, self.stride_S):
            state[target] = state[source]
        self.sampler.move(source, target)

    def prefill(self, slots: slice, start: int, length: int) -> None:
        """Read the positions from `start` on of consecutive slots; what lies beyond a prompt is overwritten later."""
        at_L = torch.arange(start, start + length, device=self.tokens_SC.device).clamp_(max=self.cache.columns - 2)
        ids_RL = self.tokens_SC[slots][:, at_L]
        span = self.cache.span(slots, at_L.expand(ids_RL.shape), min(start + length, self.cache.columns))
        self.stacks[self.backbone.base_model](embeddings(self.backbone)(ids_RL), span)

    def step(self, R: int, columns: int, plain: bool, masked: bool = True) -> Tensor:
        """Advance the first R slots; returns the (R, K) tokens made, of which each keeps its first k'.

        Args:
            columns: how many columns of the cache to look at; those in use, or more.
            plain: none of the slots has sampling options beyond a temperature.
            masked: False when all slots use exactly `columns` columns and one entry is read.
        """
        length_R, k = self.length_S[:R], self.k
        block_K = torch.arange(k, device=length_R.device)
        start_R = length_R - k
        prefix_RK = self.tokens_SC[:R].gather(1, (start_R[:, None] + block_K).clamp_(min=0))
        new_RK = length_R[:, None] + block_K
        noise_RK = self.noise_SC[:R].gather(1, new_RK)
        windows = Windows(
            context_BN=self.tokens_SC[:R],
            anchors_BW=length_R[:, None] - 1,
            noise_BWK=noise_RK[:, None],
            temperature_B=self.sampler.temperature_S[:R],
            prefix_BWP=prefix_RK[:, None],
        )

        def pick(logits_BWV: Tensor, offset: int) -> Tensor:
            kept = None if plain else self.stride_S[:R] > offset
            return self.sampler(logits_BWV[:, 0], noise_RK[:, offset], kept, plain)[:, None]

        reader = SlotReader(self, self.backbone.base_model, start_R, columns, masked)
        turns = self.readout.turns(self.backbone, windows, reader, None, pick)
        made_RK = torch.cat([token for _, token in turns], dim=1)
        self.tokens_SC[:R].scatter_(1, new_RK, made_RK)
        length_R.add_(self.stride_S[:R]).clamp_(max=self.max_model_len - 1)
        return made_RK
