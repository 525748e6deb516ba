"""Which models a replica serves, and their loading: directories and registered MLflow models."""

from __future__ import annotations

import difflib
import json
import time
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kforcing import PushForwardLM
from kforcing.engine import Counts, Engine, EngineConfig, Request
from kforcing.engine.loading import load_model, load_tokenizer
from serve.loop import EngineLoop, Worker
from serve.metrics import EngineMetrics, Metrics


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
    slots: int = Field(16, ge=1)
    """Requests that run at once on a replica."""
    max_len: int | None = Field(None, ge=2)
    """Longest prompt and answer together, in tokens."""
    max_waiting: int = Field(128, ge=0)
    """Requests that may wait on a replica beyond those that run; more are answered with 429."""
    prefill_tokens: int = Field(256, ge=1)
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
    """Requests a replica that autoscaling aims at; `slots` when left out: a full batch and no line."""
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


class ServedModel:
    """A model, its tokenizer and the loop that runs its engine."""

    def __init__(self, name: str, engine: Engine, path: Path):
        self.name, self.engine = name, engine
        self.tokenizer = load_tokenizer(path)
        self.eos = eos_ids(path, self.tokenizer, engine.vocabulary)
        # One request through the bare engine: weights packed, kernels chosen, graphs captured before clients come.
        engine.generate([Request([0], 2 * engine.k)])
        engine.counts = Counts()
        self.proved = time.monotonic()
        """When a forward pass was last shown to work."""
        self.loop: EngineLoop
        self.metrics: EngineMetrics

    def open(self, metrics: EngineMetrics, max_waiting: int, worker: Worker) -> None:
        """Begin to take requests."""
        self.metrics = metrics
        self.loop = EngineLoop(self.engine, metrics, max_waiting, worker)


def eos_ids(path: Path, tokenizer: Any, vocabulary: int) -> frozenset[int]:
    """End-of-text ids: the tokenizer's, and those of a generation config if one was saved (a config's own are defaults)."""
    saved = path / "generation_config.json"
    named = json.loads(saved.read_text()).get("eos_token_id") if saved.is_file() else None
    ids = named if isinstance(named, list) else [named]
    return frozenset(i for i in (*ids, tokenizer.eos_token_id) if isinstance(i, int) and 0 <= i < vocabulary)


def loading(settings: Settings) -> dict[str, Any]:
    """The settings that a loaded model depends on; the others can change without loading it again."""
    fields = {"model", "name", "teacher", "k", "slots", "max_len", "prefill_tokens", "batch_invariant", "coupling"}
    return settings.model_dump(include=fields | {"device", "dtype", "packed"})


def load_all(settings: Settings, metrics: Metrics, replica: str, worker: Worker) -> dict[str, ServedModel]:
    """Everything a replica serves, by name. Raises FileNotFoundError or ValueError that says what is wrong."""
    path = resolve(settings.model)
    model = load_model(path, settings.device, settings.dtype)
    name = settings.name or default_name(settings.model)
    models = [ServedModel(name, Engine(model, engine_config(settings, settings.k)), path)]
    if settings.teacher not in ("auto", "none"):
        folder = resolve(settings.teacher)
        teacher: Any = load_model(folder, settings.device, settings.dtype)
        models.append(ServedModel("teacher", Engine(teacher, engine_config(settings, 1)), folder))
    elif settings.teacher == "auto" and isinstance(model, PushForwardLM) and model.config.design.exact_trunk:
        config = engine_config(settings, 1, model.config.design.coupling)
        models.append(ServedModel("teacher", Engine(model.backbone, config), path))
    for served in models:  # none before all are loaded
        served.open(EngineMetrics(metrics, served.name, replica), settings.max_waiting, worker)
    return {served.name: served for served in models}


def pinned(model: str) -> str:
    """`models:/name@alias` as the version it means now, so that all replicas, those to come included, serve the same."""
    if not model.startswith("models:/") or "@" not in model:
        return model
    from mlflow import MlflowClient

    name, alias = model.removeprefix("models:/").split("@", 1)
    return f"models:/{name}/{MlflowClient().get_model_version_by_alias(name, alias).version}"


def engine_config(settings: Settings, k: int | None, coupling: str | None = None) -> EngineConfig:
    """The engine that settings ask for."""
    return EngineConfig(
        slots=settings.slots,
        max_len=settings.max_len,
        k=k,
        prefill_tokens=settings.prefill_tokens,
        batch_invariant=settings.batch_invariant,
        coupling=coupling or settings.coupling,
        packed=settings.packed,
    )


def resolve(model: str) -> Path:
    """A local directory for a path or an MLflow URI. Raises FileNotFoundError when there is none."""
    if model.startswith(("models:/", "runs:/")):
        from mlflow.artifacts import download_artifacts

        root = Path(download_artifacts(model))
        found = next((file.parent for file in sorted(root.rglob("config.json"))), None)
        if found is None:
            raise FileNotFoundError(f"{model} holds no config.json")
        return found
    path = Path(model)
    if not path.is_dir():
        raise FileNotFoundError(
            f"model={model}: no such directory on this node; give an absolute path that every node sees, or a registered "
            "model as models:/name@alias"
        )
    return path


def default_name(model: str) -> str:
    """The last part of a path, or a registered model's name without version or alias."""
    if model.startswith("models:/"):
        return model.removeprefix("models:/").split("@")[0].split("/")[0]
    return Path(model).absolute().name
