"""A given teacher, copied into the run."""

from __future__ import annotations

from kforcing.attention.reader import check_backbone
from kforcing.backbone import build_backbone, load_ar


def copy_teacher(path: str, gguf_file: str | None, folder: str) -> None:
    """Load a Hugging Face causal LM, check that its head can be shared, and write it to the stage's folder."""
    backbone = load_ar(path, gguf_file)
    check_backbone(backbone)
    if gguf_file:  # transformers does not save a model it has dequantised: move the weights to a plain one
        record = backbone.config.to_dict()
        record.pop("quantization_config", None)
        plain = build_backbone(record).float()
        plain.load_state_dict(backbone.state_dict())
        plain.generation_config = backbone.generation_config
        backbone = plain
    backbone.save_pretrained(folder)
