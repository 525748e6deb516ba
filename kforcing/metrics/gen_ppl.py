"""Gen-PPL: perplexity of generated text under an external causal LM (as in MDLM, arXiv 2406.07524).

Gen-PPL alone says little: a text that repeats one token has an excellent Gen-PPL. Read it beside the entropy and
distinct-n of `diversity.py`, and compare texts of equal length and number.

Shapes: C texts, B rows of a batch, N tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from kforcing.metrics.diversity import Clusters, interval_over
from kforcing.metrics.external import External, Piece, batches_of, pad
from kforcing.metrics.intervals import Interval

LOGIT_ROWS = 256
"""Rows of logits whose float32 log-softmax exists at a time."""


@dataclass(frozen=True)
class GenPPL:
    """Negative log-likelihood of C texts under an external LM: sums in nats, and numbers of scored tokens, (C,) float64."""

    nll_C: np.ndarray
    tokens_C: np.ndarray

    @property
    def by_token(self) -> float:
        """Perplexity in which every token has the same weight, as papers report it. NaN without tokens."""
        return math.exp(self.nll_C.sum() / self.tokens_C.sum()) if self.tokens_C.any() else math.nan

    @property
    def by_document(self) -> float:
        """Perplexity in which every text with scored tokens has the same weight (a geometric mean). NaN without tokens."""
        means_C, scored_C = self._document_means()
        return math.exp(means_C.sum() / scored_C.sum()) if scored_C.any() else math.nan

    def _document_means(self) -> tuple[np.ndarray, np.ndarray]:
        scored_C = (self.tokens_C > 0).astype(float)
        return self.nll_C / np.maximum(self.tokens_C, 1), scored_C

    def intervals(self, draws: int, seed: int, cluster_C: Clusters = None) -> dict[str, Interval]:
        """Both perplexities with 95% intervals, the exponentials of the mean's; empty when no text has a scored token.

        Args:
            draws: resamples of the bootstrap.
            seed: of the bootstrap.
            cluster_C: what is resampled, such as the document of each text; none for the texts.
        """
        figures = {"by_token": (self.nll_C, self.tokens_C), "by_document": self._document_means()}
        intervals = {n: interval_over(sums, counts, cluster_C, draws, seed) for n, (sums, counts) in figures.items()}
        return {name: _exp(interval) for name, interval in intervals.items() if interval}


def _exp(interval: Interval) -> Interval:
    lo, hi = (None if end is None else math.exp(end) for end in (interval.lo, interval.hi))
    return Interval(math.exp(interval.value), lo, hi)


def gen_ppl(
    external: External,
    texts: Sequence[str],
    prompts: Sequence[str] | None = None,
    context: int = 1024,
    batch_tokens: int = 1024,
) -> GenPPL:
    """Score texts, or continuations of prompts, under an external LM with its own tokenizer.

    Prompt and continuation are tokenised as one string, without special tokens except the model's start token. A token
    that holds any character of the continuation is scored, so a token that lies across the border counts whole. Without
    a prompt and a start token nothing precedes the first token, and it is not scored. An empty text has 0 tokens.

    Args:
        texts: what is scored.
        prompts: what each text follows; it is read and not scored.
        context: tokens that the LM reads at once, at most its positions. Longer texts are read in overlapping pieces:
            every token is scored once, after at least half a context.
        batch_tokens: padded tokens of a batch. Logits take batch_tokens × V numbers in the model's dtype.
    Raises:
        ValueError: when the numbers of prompts and texts differ, or `context` is below 2.
    """
    prompts = [""] * len(texts) if prompts is None else prompts
    if len(prompts) != len(texts):
        raise ValueError(f"{len(prompts)} prompts for {len(texts)} texts; give one for each")
    context = external.longest(context)
    if context < 2:
        raise ValueError(f"context={context} leaves no token to predict from; use 2 or more")
    nll_C, tokens_C = np.zeros(len(texts)), np.zeros(len(texts))
    pieces: list[Piece] = []
    for text, (ids, first) in enumerate(_encode(external, prompts, texts)):
        tokens_C[text] = max(len(ids) - first, 0)
        pieces += _pieces(text, ids, first, context)
    for batch in batches_of(pieces, batch_tokens):
        np.add.at(nll_C, [piece.text for piece in batch], _nll_sums(external.model, batch))
    return GenPPL(nll_C, tokens_C)


def _encode(external: External, prompts: Sequence[str], texts: Sequence[str]) -> Iterator[tuple[list[int], int]]:
    """For each text the tokens of its prompt and itself, and the position of the first token that is scored."""
    tokenizer, start = external.tokenizer, external.start
    for prompt, text in zip(prompts, texts, strict=True):
        whole = tokenizer(
            prompt + text, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast, verbose=False
        )
        ids = list(whole["input_ids"])
        if tokenizer.is_fast:
            first = sum(end <= len(prompt) for _, end in whole["offset_mapping"])
        else:  # a slow tokenizer gives no offsets: score from the first token that differs from those of the prompt alone
            alone = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
            same = [a == b for a, b in zip(alone, ids, strict=False)]
            first = same.index(False) if False in same else len(same)
        if not text:
            first = len(ids)
        yield ([start, *ids], first + 1) if start is not None else (ids, max(first, 1))


def _pieces(text: int, ids: list[int], first: int, context: int) -> Iterator[Piece]:
    """A text in pieces that overlap by half a context, without the pieces in which nothing is scored."""
    done = 0
    while max(done, first) < len(ids):
        end = min(len(ids), done + context // 2 if done else context)
        begin = max(0, end - context)
        if first < end:
            yield Piece(text, ids[begin:end], max(done, first) - begin)
        done = end


@torch.inference_mode()
def _nll_sums(model: Any, pieces: list[Piece]) -> np.ndarray:
    """(B,) float64: nats of each piece's scored tokens."""
    ids_BN, mask_BN = pad([piece.ids for piece in pieces], model.device)
    logits_BNV = model(input_ids=ids_BN, attention_mask=mask_BN.long(), use_cache=False).logits
    first_B = torch.tensor([piece.first for piece in pieces], device=model.device)
    scored_BN = mask_BN & (torch.arange(ids_BN.shape[1], device=model.device) >= first_B[:, None])
    sums_B = torch.zeros(len(pieces), dtype=torch.float64)
    for chunk in scored_BN.nonzero().split(LOGIT_ROWS):
        rows, columns = chunk.T
        nll = cross_entropy(logits_BNV[rows, columns - 1].float(), ids_BN[rows, columns], reduction="none")
        sums_B.index_add_(0, rows.cpu(), nll.double().cpu())
    return sums_B.numpy()
