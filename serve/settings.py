"""Settings of a deployment, and their validation."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError


class Settings(BaseModel):
    """What `serve run serve.app:build name=value …` and the `args` of a config file may say."""

    model_config = ConfigDict(extra="forbid")

    model: str
    """A student's or a transformers model's directory, or a registered model: `models:/name@alias`, `models:/name/3`."""
    name: str | None = None
    """What clients call it; the directory's or the registered model's name when left out."""
    teacher: str = "auto"
    """AR model served beside it as `teacher`: a directory, `none`, or `auto` for the one inside a sequential student."""
    k: int | None = Field(None, ge=1)
    """Tokens a step; the student's k when left out. A request may ask for fewer."""
    max_num_seqs: int = Field(16, ge=1)
    """Requests that run at once on a replica."""
    max_model_len: int | None = Field(None, ge=2)
    """Longest prompt and answer together, in tokens."""
    max_waiting: int = Field(128, ge=0)
    """Requests that may wait on a replica beyond those that run; more are answered with 429."""
    max_num_batched_tokens: int = Field(256, ge=1)
    """Prompt tokens read between two steps."""
    batch_invariant: bool = False
    """See `EngineConfig.batch_invariant`."""
    coupling: str = "inverse_cdf"
    """How noise picks tokens of a plain AR model."""
    device: str | None = None
    dtype: str | None = None
    """`fp32` or `bf16`; as saved when left out."""
    packed: bool | None = None
    """See `EngineConfig.packed`."""
    api_key: str | None = None
    """Wanted in `Authorization: Bearer …`; the environment variable KFORCING_API_KEY when left out, none if that is unset."""
    max_body_mb: float = Field(4.0, gt=0)
    """Larger requests are refused."""
    cpus: float = Field(1.0, gt=0)
    gpus: float = Field(0.0, ge=0)
    """Of a replica."""
    min_replicas: int = Field(1, ge=0)
    max_replicas: int = Field(1, ge=1)
    target_ongoing_requests: float | None = Field(None, gt=0)
    """Requests a replica that autoscaling aims at; `max_num_seqs` when left out: a full batch and no line."""
    upscale_delay_s: float = Field(10.0, ge=0)
    downscale_delay_s: float = Field(300.0, ge=0)
    drain_s: float = Field(600.0, ge=0)
    """How long a replica that is going away may finish what it has begun."""


def read_settings(given: dict[str, Any]) -> Settings:
    """Settings from names and values, which may be text. Raises ValueError that names what is wrong, and the near miss."""
    for name in given:
        if name not in Settings.model_fields:
            near = difflib.get_close_matches(name, Settings.model_fields, 1)
            known = f"did you mean {near[0]}?" if near else f"there are: {', '.join(Settings.model_fields)}"
            raise ValueError(f"{name}={given[name]}: no such setting; {known}")
    try:
        settings = Settings(**given)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        value = "" if first["type"] == "missing" else f"={first['input']}"
        raise ValueError(f"{name}{value}: {first['msg']} (serve run serve.app:build model=DIR name=value …)") from None
    if Path(settings.model).is_dir():  # replicas run in other directories
        settings.model = str(Path(settings.model).absolute())
    if settings.min_replicas > settings.max_replicas:
        raise ValueError(f"min_replicas={settings.min_replicas} is more than max_replicas={settings.max_replicas}")
    return settings
