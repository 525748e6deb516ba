"""What the baselines share: the `Decoder` protocol, windows of real text, and decoding over the engine's cache and layers.

`Rows` holds tokens and noise of rows that grow at different speeds. `RowReader` runs a model over them. `decode_rows` calls a
step until every row is complete.

Shapes: R rows, C columns (positions), L entries of a read, T new tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kforcing.backbone import embeddings, key_heads
from kforcing.engine.cache import SlotCache
from kforcing.engine.layers import build_stack
from kforcing.engine.linear import can_use_kernel, row_copy
from kforcing.keys import derive_key
from kforcing.noise import uniform


@dataclass(frozen=True)
class TextWindows:
    """Windows of real text, for methods that are trained on the corpus itself."""

    tokens_BN: Tensor
    """int64."""
    anchors_BW: Tensor
    """int64 positions with at least k tokens after them."""
    noise_BWK: Tensor
    """float64, one uniform number in (0, 1) for each of the k tokens after an anchor."""

    @property
    def following_BWK(self) -> Tensor:
        """The k tokens after each anchor."""
        B, W, K = self.noise_BWK.shape
        at = self.anchors_BW[..., None] + 1 + torch.arange(K, device=self.anchors_BW.device)
        return self.tokens_BN.gather(1, at.flatten(1)).view(B, W, K)


@dataclass(frozen=True)
class Decoded:
    """Continuations of prompts of the same length, and the passes that they took."""

    tokens_RT: Tensor
    """int64, T tokens for every row."""
    passes: float
    """Forward passes for each token of a row, counted over all models that ran."""


class Decoder(Protocol):
    """Anything that continues prompts."""

    def decode(self, prompts_RN: Tensor, new_tokens: int, seeds: list[int]) -> Decoded:
        """Continue prompts.

        Args:
            prompts_RN: int64, all of the same length.
            new_tokens: T.
            seeds: one for each row. A row's noise depends on its seed and the position alone, as in the engine, so
                verifying decoders reproduce the AR model's text.
        """
        ...


class Rows:
    """Tokens and noise of rows. Each row has its own length until it has all its new tokens.

    Args:
        prompts_RN: int64.
        seeds: of the noise of each row.
        new_tokens: T.
        spare: columns behind the last token, to which a step may write.
    """

    def __init__(self, prompts_RN: Tensor, seeds: list[int], new_tokens: int, spare: int = 0):
        R, N = prompts_RN.shape
        self.goal, columns = N + new_tokens, N + new_tokens + spare
        device = prompts_RN.device
        self.tokens_RC = torch.zeros(R, columns, dtype=torch.int64, device=device)
        self.tokens_RC[:, :N] = prompts_RN
        keys = torch.tensor([derive_key(seed, "decode") for seed in seeds], device=device)[:, None]
        self.noise_RC = uniform(keys, torch.zeros_like(keys), 0, torch.arange(columns, device=device))
        self.length_R = torch.full((R,), N, device=device)

    def tokens(self, start_R: Tensor, length: int) -> Tensor:
        """(R, length) tokens of each row, from its start position on."""
        return self.tokens_RC.gather(1, self._at(start_R, length))

    def noise(self, start_R: Tensor, length: int) -> Tensor:
        """(R, length) noise of each row, from its start position on."""
        return self.noise_RC.gather(1, self._at(start_R, length))

    def append(self, made_RL: Tensor, keep_R: Tensor) -> None:
        """Append the first `keep_R` of the new tokens to each row, up to the row's final length."""
        self.tokens_RC.scatter_(1, self._at(self.length_R, made_RL.shape[1]), made_RL)
        self.length_R = (self.length_R + keep_R).clamp(max=self.goal)

    def _at(self, start_R: Tensor, length: int) -> Tensor:
        return start_R[:, None] + torch.arange(length, device=start_R.device)


class RowReader:
    """A `kforcing.attention.reader.Reader` of one model over rows: a read appends to each row, from a given position on."""

    def __init__(self, backbone: PreTrainedModel, rows: int, columns: int):
        heads, width = key_heads(backbone)
        trunk: Any = backbone.base_model
        self.backbone = backbone
        self.cache = SlotCache(
            trunk.config.num_hidden_layers, rows, columns, heads, width, backbone.dtype, backbone.device
        )
        self.stack = build_stack(trunk, self.cache)
        self.next_R = torch.zeros(rows, dtype=torch.int64, device=backbone.device)

    def at(self, start_R: Tensor) -> RowReader:
        """Set the position of each row from which the next read goes on; it overwrites what was there."""
        self.next_R = start_R
        return self

    def tokens(self, tokens_RL: Tensor) -> Tensor:
        """Read (R, L) tokens. Returns their (R, L, D) final states."""
        return self.read(embeddings(self.backbone)(tokens_RL)[:, None])[:, 0]

    def read(self, block_BWLD: Tensor) -> Tensor:
        """Read (R, 1, L, D) embeddings, one window for each row. Returns their final states of the same shape."""
        R, _, L, _ = block_BWLD.shape
        positions_RL = self.next_R[:, None] + torch.arange(L, device=self.next_R.device)
        self.next_R = self.next_R + L
        span = self.cache.span(slice(0, R), positions_RL, int(positions_RL.max()) + 1)
        return self.stack(block_BWLD[:, 0], span)[:, None]

    def fork(self, stack: nn.Module, depth: int) -> RowReader:
        """Not possible: baselines have no layers beside the trunk."""
        raise NotImplementedError


class Readers:
    """Row readers of a model. A reader and its cache are kept while the shapes stay the same."""

    def __init__(self, backbone: PreTrainedModel):
        self.backbone = backbone
        self._held: tuple[tuple[int, int], RowReader] | None = None

    def __call__(self, rows: Rows) -> RowReader:
        """A reader for these rows, at position 0. Nothing that an earlier decoding left in its cache is read."""
        shape = (rows.tokens_RC.shape[0], rows.tokens_RC.shape[1])
        if self._held is None or self._held[0] != shape:
            self._held = shape, RowReader(self.backbone, *shape)
        zero = torch.zeros(shape[0], dtype=torch.int64, device=self.backbone.device)
        return self._held[1].at(zero)


def with_row_kernel(model: Any) -> Any:
    """The model with the kernel for few rows, as in the engine, where it can run; else the model itself."""
    return row_copy(model) if can_use_kernel(model) else model


def decode_rows(rows: Rows, new_tokens: int, step: Callable[[], None], passes_a_step: int) -> Decoded:
    """Call `step`, which appends to the rows, until every row has its new tokens."""
    steps = torch.zeros_like(rows.length_R)
    while (unfinished := rows.length_R < rows.goal).any():
        steps += unfinished
        step()
    passes = steps.double().mean().item() * passes_a_step / new_tokens
    return Decoded(rows.tokens_RC[:, rows.goal - new_tokens : rows.goal], passes)


def verify(drafts_RK: Tensor, sure_RL: Tensor) -> Tensor:
    """How many of the AR model's tokens are kept: those before which all drafts equal the AR model's tokens.

    Args:
        drafts_RK: int64.
        sure_RL: the AR model's tokens. Token j was made after the drafts before j, so it is right when these are.
    Returns:
        (R,) int64 in 1 … L.
    """
    right = drafts_RK == sure_RL[:, : drafts_RK.shape[1]]
    return (right.int().cumprod(1).sum(1) + 1).clamp(max=sure_RL.shape[1])
