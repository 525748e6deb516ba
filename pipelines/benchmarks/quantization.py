"""What weights of 8 bits change: the AR model's distributions with `quantization=int8` against those of its own weights.

    python -m pipelines.benchmarks.quantization                  SmolLM2-135M-Instruct (`make .venv/.gguf`) on its own chats
    python -m pipelines.benchmarks.quantization --model DIR --text FILE.parquet

Both models read the same documents. Per token: the loss of each, Kullback–Leibler divergence and total variation of the two,
and how often both have the same likeliest token. Intervals are 95%, bootstrapped over documents.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from torch import Tensor

import pipelines.data
from kforcing.backbone import load_ar
from kforcing.engine.linear import can_use_kernel, row_copy
from kforcing.loading import load_tokenizer, locate_model
from kforcing.metrics.intervals import cluster_bootstrap

CHATS = Path(pipelines.data.__file__).parent / "corpora" / "smollm2-chat.parquet"
FIGURES = ("loss", "loss, int8", "KL", "total variation", "same likeliest token")


@torch.inference_mode()
def compare(model: Any, documents: list[list[int]]) -> Tensor:
    """(documents, 1 + figures) float64: tokens of each document, and sums over them of each figure."""
    quantised = row_copy(model, int8=True)
    sums = []
    for ids in documents:
        text = torch.tensor([ids])
        p, q = (m(text).logits[0, :-1].double().log_softmax(dim=-1) for m in (model, quantised))
        target = text[0, 1:, None]
        figures = (
            -p.gather(1, target).squeeze(1),
            -q.gather(1, target).squeeze(1),
            (p.exp() * (p - q)).sum(dim=1),
            (p.exp() - q.exp()).abs().sum(dim=1) / 2,
            (p.argmax(dim=1) == q.argmax(dim=1)).double(),
        )
        sums.append(torch.stack([torch.tensor(len(target)).double(), *(figure.sum() for figure in figures)]))
    return torch.stack(sums)


def main(words: list[str] | None = None) -> None:
    """Read the command line, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a folder, a hub id or smollm2 (default)")
    parser.add_argument(
        "--text", type=Path, default=CHATS, help="Parquet with a column `text` (default: its own chats)"
    )
    parser.add_argument("--documents", type=int, default=48, help="how many of them (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of each at most (default %(default)s)")
    given = parser.parse_args(words)
    if given.documents < 2:
        parser.error(f"--documents {given.documents} must be at least 2, because intervals need several")
    folder, gguf = locate_model(given.model)
    model = load_ar(folder, gguf)
    if not can_use_kernel(model):
        parser.error("quantization=int8 needs a CPU under Linux and the package llvmlite (pip install 'kforcing[cpu]')")
    tokenizer = load_tokenizer(folder, gguf)
    texts = pq.read_table(given.text, columns=["text"])["text"].to_pylist()[-given.documents :]
    documents = [tokenizer(text, add_special_tokens=False)["input_ids"][: given.tokens] for text in texts]
    sums = compare(model, [ids for ids in documents if len(ids) > 1])
    print(f"{int(sums[:, 0].sum())} tokens of {len(sums)} documents")
    for name, figure in zip(FIGURES, cluster_bootstrap(sums[:, 1:].numpy(), sums[:, 0].numpy(), 1000, 0), strict=True):
        print(f"{name:>22}  {figure.value:.4f} [{figure.lo:.4f}, {figure.hi:.4f}]")


if __name__ == "__main__":
    main()
