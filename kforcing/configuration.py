"""`PushForwardConfig`: a student's `config.json` as a configuration of transformers."""

from __future__ import annotations

import dataclasses
from importlib import import_module
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from kforcing.design import Design, NoiseConfig, SequentialConfig

FORMAT_VERSION = 2


class PushForwardConfig(PretrainedConfig):
    """Everything that is needed to rebuild a `PushForwardLM`, except its weights.

    Args:
        k: tokens of one forward pass, at least 1.
        backbone: the Hugging Face config of the backbone, as `PretrainedConfig.to_dict` returns it.
        design: read-out and coupling, as a `Design` or as the dictionary that `config.json` holds.
        format_version: version of the file format.
        kwargs: the fields that every config of transformers has, for example `dtype`.
    Raises:
        ValueError: for a k below 1, a design that is inconsistent, or an unknown format version.
    """

    model_type = "kforcing"

    def __new__(cls, *_: Any, **__: Any) -> PushForwardConfig:
        """A new, copied or unpickled config: from now on the Auto classes know its model.

        Not when transformers is imported: what the model needs of transformers may then be half imported.
        """
        import_module("kforcing.modeling")
        return super().__new__(cls)

    def __init__(
        self,
        k: int = 1,
        backbone: dict[str, Any] | None = None,
        design: Design | dict[str, Any] | None = None,
        format_version: int = FORMAT_VERSION,
        **kwargs: Any,
    ):
        if format_version != FORMAT_VERSION:
            raise ValueError(
                f"this student has format version {format_version}; this release reads version {FORMAT_VERSION}"
            )
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        self.k, self.backbone = k, backbone or {}
        self.design = _design(design) if isinstance(design, dict) else design or Design()
        self.design.check()
        kwargs.setdefault("dtype", self.backbone.get("dtype"))
        super().__init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The config as plain data, which `config.json` holds."""
        return {**super().to_dict(), "design": dataclasses.asdict(self.design), "format_version": FORMAT_VERSION}

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read `config.json` of a folder or hub id. Raises FileNotFoundError or ValueError if it is not a student's."""
        folder = Path(pretrained_model_name_or_path)
        if folder.is_dir() and not (folder / kwargs.get("subfolder", "") / "config.json").is_file():
            raise FileNotFoundError(
                f"no config.json in {folder}; expected a folder written by PushForwardLM.save_pretrained"
            )
        record, rest = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if record.get("model_type") != cls.model_type:
            raise ValueError(
                f"{pretrained_model_name_or_path} does not describe a PushForwardLM but a model of type "
                f"{record.get('model_type')}; load plain causal LMs with transformers"
            )
        return record, rest


def _design(record: dict[str, Any]) -> Design:
    noise, sequential = NoiseConfig(**record["noise"]), SequentialConfig(**record["sequential"])
    return Design(**{**record, "noise": noise, "sequential": sequential})
