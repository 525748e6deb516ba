"""A given teacher, copied into the run."""

from __future__ import annotations

from kforcing.attention.reader import check_backbone
from kforcing.backbone import load_ar
from kforcing.loading import save_checked
from kforcing.remote import local
from pipelines.files import added_files


def copy_teacher(path: str, gguf_file: str | None, folder: str) -> None:
    """Load a Hugging Face causal LM, check that it can be a backbone, and write it to the stage's folder or URI in float32.

    Raises ValueError when it cannot, or when the copy computes something else.
    """
    backbone = load_ar(path, gguf_file)
    check_backbone(backbone)
    local(folder).mkdir(parents=True, exist_ok=True)
    with added_files(local(folder), last="config.json") as partial:
        save_checked(backbone, partial)
