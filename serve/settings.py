"""The settings of a deployment, and their validation."""

from __future__ import annotations

import difflib
import logging
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

logger = logging.getLogger("ray.serve")

RENAMED = {
    "slots": "max_num_seqs",
    "max_len": "max_model_len",
    "prefill_tokens": "max_num_batched_tokens",
    "packed": "row_kernel",
}
"""Former names of settings. They still work, with a warning."""


class Settings(BaseModel):
    """The settings that `serve run serve.app:build name=value …` and the `args` of a config file accept."""

    model_config = ConfigDict(extra="forbid")

    model: str
    """The directory of a student or of a transformers model, or a registered model: `models:/NAME@ALIAS` or
    `models:/NAME/VERSION`."""
    name: str | None = None
    """The model's name for clients; by default the name of the directory or of the registered model."""
    teacher: str = "auto"
    """An AR model that is served beside it under the name `teacher`: a directory or a registered model, `none`, or `auto`
    for the AR model inside a sequential student."""
    k: int | None = Field(None, ge=1)
    """The most tokens per step; the student's k by default, and 1 for an AR model. A request may ask for fewer."""
    acceptance: Literal["auto", "exact", "fixed"] = "auto"
    """The mode of requests that choose none (see `kforcing.engine.Request.acceptance`). `auto` is `exact` wherever the model
    can verify tokens: AR models, and sequential students with a frozen trunk. Every other student decodes in `fixed` mode."""
    max_num_seqs: int = Field(16, ge=1)
    """The most requests that run at once on a replica."""
    max_model_len: int | None = Field(None, ge=2)
    """The most tokens of a prompt and its answer together; by default what the model allows, at most 2,048."""
    max_waiting: int = Field(128, ge=0)
    """The most requests that wait on a replica. When the waiting queue is full, the replica answers 429."""
    max_num_batched_tokens: int = Field(256, ge=1)
    """The most prompt tokens that are read between two steps."""
    prefix_cache_mb: int = Field(256, ge=0)
    """MiB for prompts that were read, so that a prompt with the same beginning is not read again; 0 for none."""
    prefix_cache_device: str | None = None
    """Where they are kept, for example `cpu`; by default the model's device."""
    batch_invariant: bool = False
    """See `EngineConfig.batch_invariant`."""
    coupling: str = "inverse_cdf"
    """The rule by which noise selects tokens of an AR model; a student has its own."""
    device: str | None = None
    """A device name of torch; by default a GPU if there is one."""
    dtype: str | None = None
    """`fp32` or `bf16`; by default the dtype of the saved weights."""
    row_kernel: bool | None = None
    """See `EngineConfig.row_kernel`."""
    quantization: str | None = None
    """See `EngineConfig.quantization`."""
    api_key: str | None = None
    """The key that clients must send as `Authorization: Bearer KEY`, or several with commas between them, between which slots
    are shared fairly. The default is the environment variable KFORCING_API_KEY; without either, the endpoint is open."""
    allow_origins: str = "*"
    """Web pages that may use the endpoint (CORS): origins with commas between them, `*` for all, or `none`."""
    max_body_mb: float = Field(4.0, gt=0)
    """The largest body of a request in MB (2^20 bytes); the server answers 413 to a larger one."""
    cpus: float = Field(1.0, gt=0)
    """CPUs of a replica."""
    gpus: float = Field(0.0, ge=0)
    """GPUs of a replica."""
    min_replicas: int = Field(1, ge=0)
    max_replicas: int = Field(1, ge=1)
    target_ongoing_requests: float | None = Field(None, gt=0)
    """Requests per replica that autoscaling aims at. The default is `max_num_seqs`: a full batch, and nothing waits."""
    upscale_delay_s: float = Field(10.0, ge=0)
    """Seconds of high load before a replica is added."""
    downscale_delay_s: float = Field(300.0, ge=0)
    """Seconds of low load before a replica is removed."""
    load_after_drain: bool = False
    """When the models change in place, first finish what runs and free the old weights, then load the new ones. Requests that
    come in between wait. By default the old models answer until the new ones are loaded, which needs memory for both."""
    drain_s: float = Field(600.0, ge=0)
    """Seconds for which a replica that is removed may finish its requests."""

    @field_validator("api_key")
    @classmethod
    def _refuse_empty_keys(cls, given: str | None) -> str | None:
        if given is not None and not all(key.strip() for key in given.split(",")):
            raise ValueError("a key is empty; leave out both api_key and KFORCING_API_KEY for an open endpoint")
        return given

    @property
    def api_keys(self) -> list[str]:
        """`api_key` as a list, without blanks around the keys."""
        return [] if self.api_key is None else [key.strip() for key in self.api_key.split(",")]

    @property
    def origins(self) -> list[str]:
        """`allow_origins` as a list."""
        return [] if self.allow_origins == "none" else [each.strip() for each in self.allow_origins.split(",")]


def read_settings(given: dict[str, Any]) -> Settings:
    """Settings from names and values; values may be text.

    Raises ValueError that names the wrong setting, and the most similar name if there is one.
    """
    given = _with_new_names(given)
    for name in given:
        if name not in Settings.model_fields:
            near = difflib.get_close_matches(name, Settings.model_fields, 1)
            known = f"did you mean {near[0]}?" if near else f"there are: {', '.join(Settings.model_fields)}"
            raise ValueError(f"there is no setting {name}; {known}")  # its value may be a secret
    try:
        settings = Settings(**given)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        value = "" if first["type"] == "missing" or name == "api_key" else f"={first['input']}"
        raise ValueError(f"{name}{value}: {first['msg']} (serve run serve.app:build model=DIR name=value …)") from None
    if Path(settings.model).is_dir():  # replicas run in other directories
        settings.model = str(Path(settings.model).absolute())
    if settings.min_replicas > settings.max_replicas:
        raise ValueError(f"min_replicas={settings.min_replicas} is more than max_replicas={settings.max_replicas}")
    return settings


def _with_new_names(given: dict[str, Any]) -> dict[str, Any]:
    """The settings with each former name replaced by the new one. Raises ValueError if both names are given."""
    result = dict(given)
    for old, new in RENAMED.items():
        if old in result:
            if new in result:
                raise ValueError(
                    f"{old}={result[old]}: this setting is now called {new}, which is given too; drop {old}"
                )
            logger.warning("the setting %s is now called %s; please use the new name", old, new)
            result[new] = result.pop(old)
    return result
