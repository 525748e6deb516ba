"""A given teacher, copied into the run."""

from __future__ import annotations

from pathlib import Path

from kforcing.attention.reader import check_backbone
from kforcing.backbone import load_ar
from kforcing.loading import save_checked
from pipelines.files import added_files


def copy_teacher(path: str, gguf_file: str | None, folder: str) -> None:
    """Load a Hugging Face causal LM, check that it can be a backbone, and write it to the stage's folder in float32.

    Raises ValueError when it cannot, or when the copy computes something else.
    """
    backbone = load_ar(path, gguf_file)
    check_backbone(backbone)
    with added_files(Path(folder), last="config.json") as partial:
        save_checked(backbone, partial)
