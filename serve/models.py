"""The models of a replica: how they are found (directories and registered MLflow models), loaded and opened."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from kforcing import PushForwardLM
from kforcing.detokenizer import Detokenizer
from kforcing.engine import Engine, EngineConfig, EngineStats, Request, checked_sizes
from kforcing.families import find_obstacle
from kforcing.loading import (
    eos_token_ids,
    load_model,
    load_tokenizer,
    model_without_weights,
    saved_generation_config,
)
from kforcing.model_uri import PREFIX, check_path, parse_model_uri, refuse_links
from kforcing.remote import SCHEMES, fetch, is_uri
from kforcing.structured import Grammars
from serve.engine_thread import AsyncEngine, EngineThread
from serve.metrics import EngineMetrics, Metrics
from serve.settings import Settings


class ServedModel:
    """A model with its tokenizer and its engine."""

    def __init__(self, name: str, engine: Engine, path: Path):
        self.name, self.engine = name, engine
        self.tokenizer = load_tokenizer(path)
        self.detokenizer = Detokenizer(self.tokenizer)
        self.literal = Detokenizer(self.tokenizer, keep_special=True)
        self.eos = eos_token_ids(saved_generation_config(path), self.tokenizer, engine.vocabulary)
        self.grammars = Grammars(self.tokenizer, engine.vocabulary, self.eos)
        # Warm-up: this request packs the weights, chooses kernels and captures graphs before the first client comes.
        engine.generate([Request([0], 2 * engine.k)])
        engine.stats = EngineStats()
        self.proved = time.monotonic()
        """The time at which a forward pass last succeeded."""
        self.async_engine: AsyncEngine
        self.metrics: EngineMetrics

    def open(self, metrics: EngineMetrics, max_waiting: int, thread: EngineThread) -> None:
        """Accept requests from now on."""
        self.metrics = metrics
        self.async_engine = AsyncEngine(self.engine, metrics, max_waiting, thread)


REMOTE = (PREFIX, "runs:/", *(f"{scheme}://" for scheme in SCHEMES))
"""How models begin that are not on this node."""
LOADING = {
    *("model", "name", "teacher", "k", "acceptance", "coupling", "device", "dtype"),
    *("row_kernel", "quantization", "batch_invariant"),
    *("max_num_seqs", "max_model_len", "max_num_batched_tokens", "prefix_cache_mb", "prefix_cache_device"),
}
"""Settings whose change needs the models to be loaded again."""


def loading_settings(settings: Settings) -> dict[str, Any]:
    """The settings in `LOADING`, with their values."""
    return settings.model_dump(include=LOADING)


def fetch_models(settings: Settings) -> dict[str, Path]:
    """The local directories of `model` and, if it has its own, `teacher`: downloaded, and checked without loading weights.

    Raises what `check_deployment` raises.
    """
    folders = {which: resolve(given, which) for which, given in _given(settings).items()}
    for which, path in folders.items():
        _check_folder(settings, which, path)
    return folders


def load_models(
    settings: Settings, folders: dict[str, Path], metrics: Metrics, replica: str, thread: EngineThread
) -> dict[str, ServedModel]:
    """The models of a replica by name, from the directories of `fetch_models`.

    Raises ValueError for what cannot be served.
    """
    path = folders["model"]
    model: Any = load_model(path, settings.device, settings.dtype)
    name = settings.name or default_name(settings.model)
    _check_name(settings, name, model)
    models = [ServedModel(name, Engine(model, engine_config(settings, model, settings.k)), path)]
    if folder := folders.get("teacher"):
        teacher: Any = load_model(folder, settings.device, settings.dtype)
        models.append(ServedModel("teacher", Engine(teacher, engine_config(settings, teacher, 1)), folder))
    elif settings.teacher == "auto" and _holds_ar_model(model):
        config = engine_config(settings, model.backbone, 1, model.design.coupling)
        models.append(ServedModel("teacher", Engine(model.backbone, config), path))
    for served in models:  # only when all of them have been loaded
        served.open(EngineMetrics(metrics, served.name, replica), settings.max_waiting, thread)
    return {served.name: served for served in models}


def check_deployment(settings: Settings) -> None:
    """Check what can be checked of a deployment without loading weights: `build` refuses it before a replica changes.

    Registered models and those in object storage are checked by the replicas, which download them.

    Raises:
        FileNotFoundError: for a directory without a model, weights or tokenizer.
        ValueError: for settings that do not fit the model, and for damaged weights.
    """
    for which, given in _given(settings).items():
        if not given.startswith(REMOTE):
            _check_folder(settings, which, resolve(given, which))


def _given(settings: Settings) -> dict[str, str]:
    """The settings that name a model of their own."""
    given = {"model": settings.model, "teacher": settings.teacher}
    return {which: model for which, model in given.items() if model not in ("auto", "none")}


def _check_folder(settings: Settings, which: str, path: Path) -> None:
    """See `check_deployment`."""
    given = _given(settings)[which]
    model = model_without_weights(path)
    if not isinstance(model, PushForwardLM) and (obstacle := find_obstacle(model.config)):
        raise ValueError(f"{which}={given}: this model cannot be served: {obstacle}")
    checked_sizes(model, engine_config(settings, model, settings.k if which == "model" else 1))
    load_tokenizer(path)
    if which == "model":
        _check_name(settings, settings.name or default_name(given), model)


def _check_name(settings: Settings, name: str, model: Any) -> None:
    beside = settings.teacher != "none" and (settings.teacher != "auto" or _holds_ar_model(model))
    if name == "teacher" and beside:
        raise ValueError(
            f"name={name}: the AR model beside the student has this name; choose another name=…, or teacher=none"
        )


def _holds_ar_model(model: Any) -> bool:
    return isinstance(model, PushForwardLM) and model.design.exact_trunk


def engine_config(settings: Settings, model: Any, k: int | None, coupling: str | None = None) -> EngineConfig:
    """The engine's configuration for a model under these settings."""
    verifies = not isinstance(model, PushForwardLM) or _holds_ar_model(model)
    automatic = "exact" if verifies else "fixed"
    return EngineConfig(
        max_num_seqs=settings.max_num_seqs,
        max_model_len=settings.max_model_len,
        k=k,
        acceptance=automatic if settings.acceptance == "auto" else settings.acceptance,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        prefix_cache_mb=settings.prefix_cache_mb,
        prefix_cache_device=settings.prefix_cache_device,
        batch_invariant=settings.batch_invariant,
        coupling=coupling or settings.coupling,
        row_kernel=settings.row_kernel,
        quantization=settings.quantization,
    )


def pinned(model: str) -> str:
    """`models:/NAME@ALIAS` as the version that the alias has now; any other model as it is.

    All replicas, including those that start later, then serve the same version. Raises ValueError for a malformed URI.
    """
    if not model.startswith(PREFIX):
        return model
    uri = parse_model_uri(model)
    if uri.alias is None:
        return model
    from mlflow import MlflowClient

    return f"{PREFIX}{uri.name}/{MlflowClient().get_model_version_by_alias(uri.name, uri.alias).version}"


def resolve(model: str, setting: str = "model") -> Path:
    """A local directory for a directory, a folder in object storage, a registered model, or a path `runs:/…` below a run of
    MLflow. What is not on this node is downloaded; of object storage only what has changed since the last time.

    Raises FileNotFoundError if there is none, ValueError for a malformed URI, and RemoteError when object storage refuses.
    """
    if is_uri(model):
        folder = fetch(model)
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{setting}={model} holds no config.json; give the folder of a model")
        return folder
    if model.startswith(REMOTE):
        check_path(model)
        if model.startswith(PREFIX):
            parse_model_uri(model)
        from mlflow.artifacts import download_artifacts

        root = Path(download_artifacts(model))
        refuse_links(root)
        found = next((file.parent for file in sorted(root.rglob("config.json"))), None)
        if found is None:
            raise FileNotFoundError(f"{model} holds no config.json")
        return found
    path = Path(model)
    if not path.is_dir():
        raise FileNotFoundError(
            f"{setting}={model}: there is no such directory on this node; give an absolute path that every node sees, or a "
            "registered model as models:/NAME@ALIAS or models:/NAME/VERSION, or a folder in object storage as s3://BUCKET/PATH"
        )
    return path


def default_name(model: str) -> str:
    """The name of a registered model without its version, or the last part of a path."""
    return parse_model_uri(model).name if model.startswith(PREFIX) else Path(model).absolute().name
