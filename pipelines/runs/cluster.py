"""Attach to a Ray cluster or start an embedded one, and refuse what its resources cannot run."""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipelines.config.schema import Config, ConfigError, node_selector

ROOT = Path(__file__).resolve().parents[2]
JOBS_ROOT = Path.home() / "kforcing"

# glibc otherwise returns every large tensor's pages to the kernel and faults them in again (7% of a training step).
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(8 << 30)}

_ENVIRONMENT = {
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    **MALLOC,
}


def attached() -> bool:
    """Whether this process was told of a running cluster (`RAY_ADDRESS`, as under `ray job submit`)."""
    return bool(os.environ.get("RAY_ADDRESS"))


def with_lasting_root(config: Config) -> Config:
    """An absolute `output_dir`. A job's current directory is a temporary copy, so there a relative one is below `~`."""
    if "://" in config.output_dir:
        raise ConfigError(f"output_dir={config.output_dir}: give a path on a file system every node sees, not a URI")
    base = JOBS_ROOT if attached() else Path.cwd()
    return dataclasses.replace(config, output_dir=str(base / config.relative_root))


Pool = tuple[int, float, float]
"""(count, CPUs each, GPUs each)."""

Work = dict[str, dict[str, Pool]]
"""What runs side by side: name of the work → name of a pool → its size."""


@contextmanager
def connected(config: Config, work: Work | None = None) -> Iterator[None]:
    """Start the embedded Ray, or attach to the cluster in `RAY_ADDRESS`, after checking that the work fits.

    `work` is that of a whole run when it is left out.

    Raises ConfigError when the pools do not fit, or those of a run not on the nodes they are tied to. SIGTERM (a stopped job)
    becomes SystemExit, so that the run ends like any other interruption: the next start resumes it.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    needed = work_of(config) if work is None else work
    if not attached():
        preflight(needed, {"CPU": float(os.cpu_count() or 1), "GPU": float(_local_gpus())}, "this machine")
    import ray

    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if attached():
        try:
            ray.init(runtime_env={"env_vars": _ENVIRONMENT}, **quiet)
        except ConnectionError as error:
            raise ConfigError(f"RAY_ADDRESS={os.environ['RAY_ADDRESS']}: no cluster answers there ({error})") from None
    else:
        ray.init(address="local", include_dashboard=False, **quiet)
    try:
        preflight(needed, ray.cluster_resources(), "the cluster" if attached() else "this machine")
        nodes = [node for node in ray.nodes() if node["Alive"]]
        if work is None:
            check_labels(config, nodes)
        if len(nodes) > 1 and config.root.is_relative_to(JOBS_ROOT):
            raise ConfigError(
                f"output_dir={config.root} is on one node's own disk, the cluster has {len(nodes)} nodes; give an absolute "
                "path on a file system that every node sees"
            )
    except ConfigError:
        ray.shutdown()
        raise
    _quieten()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped by SIGTERM; run the same command to continue"))
    try:
        yield
    finally:
        ray.shutdown()


def _quieten() -> None:
    """Keep Ray's own lines out of the terminal; its log files keep everything."""
    import ray.data
    import ray.train.torch  # noqa: F401  (importing configures the loggers)

    for name in ("ray", "ray.data", "ray.train"):
        for handler in logging.getLogger(name).handlers:
            if type(handler).__name__ in ("StreamHandler", "PlainRayHandler"):
                handler.setLevel(logging.ERROR)


def _local_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def work_of(config: Config) -> Work:
    """The pools of every stage of a run, and of its evaluation.

    With one reading task beside them: train workers that hold every CPU starve the data they wait for, and an actor pool that
    holds every CPU starves its own input.
    """
    reading = {"1 reading task": (1, 1.0, 0.0)}
    work = {name: {pool: sizes for _, pool, sizes in pools} | reading for name, pools in _stage_pools(config).items()}
    pool = config.eval.actors, config.eval.cpus_per_actor, config.eval.gpus_per_actor
    work["evaluation"] = {f"eval.actors={config.eval.actors}": pool} | reading
    return work


def _stage_pools(config: Config) -> dict[str, list[tuple[str | None, str, Pool]]]:
    """For each stage the label its pools are tied to, their name and size. A teacher that is trained has no rollouts."""
    pools: dict[str, list[tuple[str | None, str, Pool]]] = {}
    stages = {"teacher": config.teacher.train} if config.teacher.path is None else {}
    stages |= {f"k{k}": config.stage(f"k{k}").train for k in config.ks()}
    for name, t in stages.items():
        workers = t.workers, t.cpus_per_worker, t.gpus_per_worker
        pools[f"stage {name}"] = [(t.label, f"train.workers={t.workers}", workers)]
        if name != "teacher":
            r = config.stage(name).rollout
            actors = r.actors, r.cpus_per_actor, r.gpus_per_actor
            pools[f"stage {name}"].append((r.label, f"rollout.actors={r.actors}", actors))
    return pools


def preflight(work: Work, have: dict[str, float], where: str) -> None:
    """Raise ConfigError unless the pools of each work fit side by side: Ray would otherwise wait for ever."""
    for name, pools in work.items():
        _check_pools(name, pools, have, where)


def check_labels(config: Config, nodes: list[dict[str, Any]]) -> None:
    """Raise ConfigError unless the pools of each stage fit on the nodes whose label they are tied to.

    `nodes` as `ray.nodes()` describes them.
    """
    for name, pools in _stage_pools(config).items():
        for label in sorted({label for label, *_ in pools if label is not None}):
            selector = node_selector(label) or {}
            there = [node["Resources"] for node in nodes if selector.items() <= node["Labels"].items()]
            have = {kind: sum(resources.get(kind, 0.0) for resources in there) for kind in ("CPU", "GPU")}
            tied = {pool: sizes for tie, pool, sizes in pools if tie == label}
            if not there:
                raise ConfigError(
                    f"{name}, {' and '.join(tied)}: no node of the cluster has the label {label}, so Ray would wait for ever"
                )
            _check_pools(name, tied, have, f"the part with label {label}")


def _check_pools(work: str, pools: dict[str, Pool], have: dict[str, float], where: str) -> None:
    for kind, index in (("CPU", 1), ("GPU", 2)):
        need = {label: pool[0] * pool[index] for label, pool in pools.items() if pool[0] * pool[index]}
        if sum(need.values()) > have.get(kind, 0.0) + 1e-9:
            parts = " + ".join(f"{amount:g} for {label}" for label, amount in need.items())
            raise ConfigError(
                f"{work} needs {sum(need.values()):g} {kind}s ({parts}), {where} has {have.get(kind, 0.0):g}: "
                f"Ray would wait for ever. Ask for fewer or for fewer {kind}s each, or use a larger cluster"
            )
