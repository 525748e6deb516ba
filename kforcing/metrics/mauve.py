"""MAUVE (arXiv 2102.01454): how close the distribution of generated texts is to that of reference texts.

Shapes: C texts, D features, H cells of a histogram.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from kforcing.metrics.external import External, Piece, batches_of, pad


@torch.inference_mode()
def features(external: External, texts: Sequence[str], context: int = 1024, batch_tokens: int = 4096) -> np.ndarray:
    """(C, D) float32: the last hidden state of each text's last token, by which MAUVE represents a text.

    Args:
        texts: prompt and continuation together. The texts of both sides of a comparison should have the same length. An
            empty text is represented by the start token or the end-of-text token alone.
        context: tokens that are read of a text, at most the model's positions. The rest is cut off, as in the paper.
        batch_tokens: padded tokens of a batch.
    """
    model, tokenizer, start = external.model, external.tokenizer, external.start
    context = external.longest(context)
    before = [] if start is None else [start]
    pieces = []
    for text, words in enumerate(texts):
        ids = before + list(tokenizer(words, add_special_tokens=False, verbose=False)["input_ids"])
        pieces.append(Piece(text, ids[:context] or [tokenizer.eos_token_id or 0], 0))
    out = np.zeros((len(texts), model.config.hidden_size), np.float32)
    for batch in batches_of(pieces, batch_tokens):
        ids_BN, mask_BN = pad([piece.ids for piece in batch], model.device)
        states = model.base_model(input_ids=ids_BN, attention_mask=mask_BN.long(), use_cache=False).last_hidden_state
        last_BD = states[torch.arange(len(batch), device=model.device), mask_BN.sum(1) - 1]
        out[[piece.text for piece in batch]] = last_BD.float().cpu().numpy()
    return out


def mauve(p_features: np.ndarray, q_features: np.ndarray, clusters: int | None, seed: int, c: float = 5.0) -> float:
    """MAUVE of two samples of texts, in [0, 1]: near 1 for the same distribution, c!²/(2c)! for disjoint distributions.

    Features are scaled to unit length and projected on the principal components that hold 90% of the variance of both
    samples (the settings of the authors' package). Then k-means clusters both samples together. MAUVE grows when there
    are fewer clusters and falls when there are fewer texts, so read it beside the MAUVE of two reference samples of the
    same sizes.

    Args:
        p_features: (C, D) features of the reference texts.
        q_features: (C', D) features of the generated texts.
        clusters: number of clusters; none for a tenth of the smaller sample, at least 2.
        seed: of k-means.
        c: scaling constant; the paper's is 5.
    Raises:
        ValueError: when there are more clusters than texts, or features have different widths.
    """
    from sklearn.cluster import KMeans

    if p_features.shape[1] != q_features.shape[1]:
        raise ValueError(
            f"features have shapes {p_features.shape} and {q_features.shape}; take both from the same model"
        )
    clusters = clusters or max(2, round(min(len(p_features), len(q_features)) / 10))
    union = np.concatenate([p_features, q_features])
    if clusters > len(union):
        raise ValueError(f"{clusters} clusters for {len(union)} texts; use fewer clusters or more texts")
    points = _principal(union)
    clusters = min(clusters, len(np.unique(points, axis=0)))
    labels = KMeans(clusters, n_init=5, max_iter=500, random_state=seed).fit_predict(points)
    p_H = np.bincount(labels[: len(p_features)], minlength=clusters) / len(p_features)
    q_H = np.bincount(labels[len(p_features) :], minlength=clusters) / len(q_features)
    return frontier_area(p_H, q_H, c)


def _principal(features_CD: np.ndarray, variance: float = 0.9) -> np.ndarray:
    """Unit-length features on the fewest principal components that hold this share of the variance."""
    rows = features_CD.astype(np.float64)
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    u, s, _ = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    share = np.cumsum(s**2)
    kept = int(np.searchsorted(share, variance * share[-1])) + 1
    return np.round(u[:, :kept] * s[:kept], 9)  # equal texts keep equal features


def frontier_area(p_H: np.ndarray, q_H: np.ndarray, c: float = 5.0, points: int = 101) -> float:
    """Area under (exp(−c KL(q‖r)), exp(−c KL(p‖r))) of the mixtures r = λp + (1−λ)q, from (0, 1) to (1, 0).

    Args:
        p_H: a distribution.
        q_H: another over the same cells.
        points: values of λ, evenly in (0, 1).
    """
    curve = [(1.0, 0.0)]
    for mix in np.linspace(1e-6, 1 - 1e-6, points):
        r_H = mix * p_H + (1 - mix) * q_H
        curve.append((math.exp(-c * _kl(q_H, r_H)), math.exp(-c * _kl(p_H, r_H))))
    x, y = np.array([*curve, (0.0, 1.0)]).T
    return float(((y[:-1] + y[1:]) / 2 * (x[:-1] - x[1:])).sum())


def _kl(p_H: np.ndarray, r_H: np.ndarray) -> float:
    cells = p_H > 0
    return float((p_H[cells] * np.log(p_H[cells] / r_H[cells])).sum())
