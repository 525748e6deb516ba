"""Which models a replica serves, and their loading: directories and registered MLflow models."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from kforcing import PushForwardLM
from kforcing.engine import Engine, EngineConfig, EngineStats, Request
from kforcing.loading import load_model, load_tokenizer
from serve.engine_thread import EngineLoop, Worker
from serve.metrics import EngineMetrics, Metrics
from serve.settings import Settings


class ServedModel:
    """A model, its tokenizer and the loop that runs its engine."""

    def __init__(self, name: str, engine: Engine, path: Path):
        self.name, self.engine = name, engine
        self.tokenizer = load_tokenizer(path)
        self.eos = eos_ids(path, self.tokenizer, engine.vocabulary)
        # One request through the bare engine: weights packed, kernels chosen, graphs captured before clients come.
        engine.generate([Request([0], 2 * engine.k)])
        engine.stats = EngineStats()
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
    fields = {
        "model",
        "name",
        "teacher",
        "k",
        "max_num_seqs",
        "max_model_len",
        "max_num_batched_tokens",
        "batch_invariant",
        "coupling",
    }
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
        max_num_seqs=settings.max_num_seqs,
        max_model_len=settings.max_model_len,
        k=k,
        max_num_batched_tokens=settings.max_num_batched_tokens,
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
