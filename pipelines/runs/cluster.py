"""Attach to a Ray cluster or start an embedded one, and refuse what its resources cannot run."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kforcing.remote import address, is_uri, local
from pipelines.config.schema import Config, EvalConfig, TrainConfig
from pipelines.config.section import ConfigError, node_selector
from pipelines.config.stages import StageSpec, TeacherSpec, resolve, teacher_spec
from pipelines.data.listing import SELF
from pipelines.failures import Exit
from pipelines.log import log
from pipelines.runs.ray_watch import saying_when_ray_dies

ROOT = Path(__file__).resolve().parents[2]
JOBS_ROOT = Path.home() / "kforcing"

# glibc otherwise returns every large tensor's pages to the kernel and faults them in again (7% of a training step).
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(8 << 30)}

LONGEST_TEMP = 40
"""Characters of a temporary directory in which the names of Ray's sockets still fit."""

SHARED_MEMORY, SMALL_SHARED_MEMORY = Path("/dev/shm"), 1 << 30
"""Where Ray keeps objects, and the free bytes below which a run warns that this is too little."""

ASK_AGAIN_S = 30
"""Seconds after which an autoscaler is asked again: another run may have asked for other nodes meanwhile."""

CONNECT_S, ANSWER_S = 5, 14
"""Seconds in which the GCS of a cluster must take a connection, and answer."""

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

_ENVIRONMENT_HERE = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
}
"""Where Ray runs on this machine alone: nobody takes it away, and the end of a stage is seen early."""


def attached() -> bool:
    """Whether this process was told of a running cluster (`RAY_ADDRESS`, as under `ray job submit`)."""
    return bool(os.environ.get("RAY_ADDRESS"))


def with_lasting_root(config: Config, remote: bool = False) -> Config:
    """An absolute `output_dir`, or a URI as it is.

    A job's current directory is a temporary copy, so there a relative one is below `~`.

    Args:
        remote: whether it may be a URI.
    Raises:
        ConfigError: for a URI that may not be one, or that names no folder.
    """
    for name, place in (("output_dir", config.output_dir), ("data.cache_dir", config.data.cache_dir or "")):
        try:
            local(place)
        except ValueError as error:
            raise ConfigError(f"{name}: {error}") from None
    if is_uri(config.output_dir):
        if not remote:
            raise ConfigError(
                f"{config.output_dir}: evaluations and comparisons work on local folders; copy the run directory to one that "
                "every node sees, and give its path"
            )
        if is_uri(address(local(config.output_dir).parent)):
            return config
        raise ConfigError(f"output_dir={config.output_dir} is a whole bucket; give a folder in it, like …/runs/a")
    base = JOBS_ROOT if attached() else Path.cwd()
    return dataclasses.replace(config, output_dir=str(base / config.relative_root))


@dataclass(frozen=True)
class Pool:
    """Workers or actors that run at the same time, and what each of them reserves."""

    count: int
    cpus: float
    gpus: float
    label: str | None = None
    """`key=value` label of the nodes that they may use."""


Work = dict[str, dict[str, Pool]]
"""What runs side by side: name of the work → name of a pool → the pool."""


@contextmanager
def connected(root: Path, work: Work, wait_s: float = 0.0) -> Iterator[None]:
    """Start the embedded Ray, or attach to the cluster in `RAY_ADDRESS`, after checking that the work fits.

    Raises ConfigError when the pools do not fit on this machine, or for `wait_s` seconds not on the cluster or on the nodes
    that they are tied to, or when `root` is on one node's own disk. SIGTERM (a stopped job) becomes a KeyboardInterrupt, as
    Ctrl-C is one.
    """
    for name, value in {**_ENVIRONMENT, **({} if attached() else _ENVIRONMENT_HERE)}.items():
        os.environ.setdefault(name, value)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    if not attached():
        preflight(work, {"CPU": float(os.cpu_count() or 1), "GPU": float(_local_gpus())}, "this machine")
    import ray

    _start_ray()
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        _wait_for_nodes(work, wait_s if attached() else 0.0)
        _check_shared(root, len(_nodes()))
        _quieten()
        with saying_when_ray_dies():
            yield
    except (KeyboardInterrupt, SystemExit):
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGTERM, before)
        ray.shutdown()


def _nodes() -> list[dict[str, Any]]:
    """The nodes of the cluster, as `ray.nodes()` describes them, without those that have gone."""
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def _wait_for_nodes(work: Work, wait_s: float) -> None:
    """Return when the work fits on the cluster, which may grow: an autoscaler is asked for what each work needs.

    Raises ConfigError when it does not fit for so many seconds.
    """
    began, asked = time.monotonic(), -math.inf
    try:
        while problem := _misfit(work):
            now = time.monotonic()
            if now - began >= wait_s:
                raise problem
            if asked == -math.inf:
                log.info(f"waiting up to {wait_s:.0f} s for nodes (wait_for_nodes_s): {problem}")
            if now - asked >= ASK_AGAIN_S:
                _ask_autoscaler(largest_pools(work))
                asked = now
            time.sleep(1)
    finally:
        if asked > -math.inf:
            with suppress(Exception):  # the cluster may be gone
                _ask_autoscaler([])  # from here on, what runs says what is needed
    if asked > -math.inf:
        log.info(f"the nodes are there after {time.monotonic() - began:.0f} s")


def _misfit(work: Work) -> ConfigError | None:
    """Why the work does not fit on the cluster as it is now."""
    import ray

    try:
        preflight(work, ray.cluster_resources(), "the cluster" if attached() else "this machine")
        check_labels(work, _nodes())
    except ConfigError as error:
        return error
    return None


def largest_pools(work: Work) -> list[Pool]:
    """Pools that are enough for each work alone: of members of one shape and label as many as the work with most has."""
    most: dict[Pool, int] = {}
    for pools in work.values():
        counts: dict[Pool, int] = {}
        for pool in pools.values():
            member = dataclasses.replace(pool, count=1)
            counts[member] = counts.get(member, 0) + pool.count
        most |= {member: max(count, most.get(member, 0)) for member, count in counts.items()}
    return [dataclasses.replace(member, count=count) for member, count in most.items() if member.cpus or member.gpus]


def _ask_autoscaler(pools: Sequence[Pool]) -> None:
    """Let an autoscaler, if there is one, keep nodes for these pools. The request is the cluster's only one."""
    from ray.autoscaler.sdk import request_resources

    members = [pool for pool in pools for _ in range(pool.count)]
    bundles = [{kind: n for kind, n in (("CPU", pool.cpus), ("GPU", pool.gpus)) if n} for pool in members]
    request_resources(bundles=bundles, bundle_label_selectors=[node_selector(pool.label) or {} for pool in members])


def _start_ray() -> None:
    """Start or join a cluster. Raises ConfigError, in one line, when that fails."""
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    address = os.environ.get("RAY_ADDRESS")
    if address:
        _check_address(address)
        options |= {"runtime_env": {"env_vars": _environment_of_workers()}}
    else:
        options |= {"address": "local", "include_dashboard": False}
        _warn_of_small_memory(SHARED_MEMORY)
        if len(tempfile.gettempdir()) > LONGEST_TEMP:  # the names of sockets in it have a limit
            options["_temp_dir"] = os.path.join(os.sep, "tmp", "ray")
    try:
        init_ray(**options)
    except Exception as error:
        where = f"RAY_ADDRESS={address}" if address else "Ray does not start on this machine"
        text = f"{where}: {' '.join(str(error).split())[:300] or type(error).__name__}"
        raise ConfigError(text, Exit.CLUSTER) from None


def _warn_of_small_memory(place: Path) -> None:
    """Say that Ray will keep its objects on disk where shared memory is small, as it is in containers by default."""
    if place.is_dir() and (free := shutil.disk_usage(place).free) < SMALL_SHARED_MEMORY:
        log.warning(
            f"{place} has {free >> 20} MiB, so Ray keeps objects on disk, which is slower; give the container more shared "
            "memory (`docker run --shm-size=4g`, or a Kubernetes volume with medium: Memory)"
        )


def init_ray(**options: Any) -> None:
    """`ray.init`, tried once more where it starts a cluster here.

    Ray gives its own agent 15 seconds to start, which is too little on a busy machine.
    """
    import ray

    try:
        ray.init(**options)
    except Exception:
        if options.get("address") != "local" or ray.is_initialized():
            raise
        ray.shutdown()
        ray.init(**options)


def _check_address(address: str) -> None:
    """Raise ConfigError for an address that Ray would try for minutes."""
    if address in ("auto", "local"):
        return
    example = "give HOST:6379 of the head node, or submit the run with `ray job submit`, which sets it"
    host, _, port = address.rpartition(":")
    if "://" in address:
        raise ConfigError(
            f"RAY_ADDRESS={address}: a run joins a cluster by the address of its GCS, not by a URL; {example}",
            Exit.CLUSTER,
        )
    if not (host and port.isdigit() and int(port) < 2**16):
        raise ConfigError(f"RAY_ADDRESS={address} is not HOST:PORT; {example}", Exit.CLUSTER)
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except OSError as error:
        text = f"RAY_ADDRESS={address}: no cluster answers there ({error}); {example}"
        raise ConfigError(text, Exit.CLUSTER) from None
    if problem := _no_gcs(address):
        raise ConfigError(f"RAY_ADDRESS={address}: no cluster can be joined there ({problem}); {example}", Exit.CLUSTER)


def _no_gcs(address: str) -> str | None:
    """What is wrong with a GCS, asked by Ray's own client: in a process of its own, because it tries for 40 s."""
    ask = "import sys; from ray._raylet import GcsClient; GcsClient(address=sys.argv[1])"
    try:
        done = subprocess.run([sys.executable, "-c", ask, address], capture_output=True, text=True, timeout=ANSWER_S)
    except subprocess.TimeoutExpired:
        return f"no answer in {ANSWER_S} s"
    lines = done.stderr.split("\n") if done.returncode else []
    return next((line.strip()[:200] for line in reversed(lines) if line.strip()), None)


def _environment_of_workers() -> dict[str, str]:
    """The variables that workers need, without those that the job's own runtime environment sets: its values count."""
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    own = ((job.get("runtime_env") or {}).get("env_vars")) or {}
    return {name: value for name, value in _ENVIRONMENT.items() if name not in own}


def _check_shared(root: Path, nodes: int) -> None:
    if nodes > 1 and root.is_relative_to(JOBS_ROOT):
        raise ConfigError(
            f"output_dir={root} is on one node's own disk, the cluster has {nodes} nodes; give an absolute "
            "path on a file system that every node sees"
        )


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


READING = {"1 reading task": Pool(1, 1.0, 0.0)}
"""The task that reads rows beside the other pools.

Train workers that hold every CPU starve the data they wait for, and an actor pool that holds every CPU starves its input.
"""


def work_of(teacher: TeacherSpec, students: Sequence[StageSpec], evaluation: EvalConfig) -> Work:
    """The pools of every stage of a run, and of its evaluation. A teacher in training and text have no rollout actors."""
    work: Work = {}
    if teacher.train is not None:
        work[f"stage {teacher.name}"] = _trainers(teacher.train) | READING
    for spec in students:
        work[f"stage {spec.name}"] = _trainers(spec.train) | _rollout_actors(spec) | READING
    scorers = Pool(evaluation.actors, evaluation.cpus_per_actor, evaluation.gpus_per_actor)
    work["evaluation"] = {f"eval.actors={evaluation.actors}": scorers} | READING
    return work


def work_of_run(config: Config) -> Work:
    """`work_of` the stages that a config resolves to."""
    work = work_of(teacher_spec(config), resolve(config), config.eval)
    if config.data.source == SELF:
        t = config.self_text
        work["text"] = {f"self_text.actors={t.actors}": Pool(t.actors, t.cpus_per_actor, t.gpus_per_actor, t.label)}
    return work


def _trainers(train: TrainConfig) -> dict[str, Pool]:
    workers = Pool(train.workers, train.cpus_per_worker, train.gpus_per_worker, train.label)
    return {f"train.workers={train.workers}": workers}


def _rollout_actors(spec: StageSpec) -> dict[str, Pool]:
    if spec.targets == "text":
        return {}
    r = spec.rollout
    return {f"rollout.actors={r.actors}": Pool(r.actors, r.cpus_per_actor, r.gpus_per_actor, r.label)}


def preflight(work: Work, have: dict[str, float], where: str) -> None:
    """Raise ConfigError unless the pools of each work fit side by side; Ray would wait for ever."""
    for name, pools in work.items():
        _check_pools(name, pools, have, where)


def check_labels(work: Work, nodes: list[dict[str, Any]]) -> None:
    """Raise ConfigError unless the pools of each work fit on the nodes whose label they are tied to.

    `nodes` as `ray.nodes()` describes them.
    """
    for name, pools in work.items():
        for label in sorted({pool.label for pool in pools.values() if pool.label is not None}):
            selector = node_selector(label) or {}
            there = [node["Resources"] for node in nodes if selector.items() <= node["Labels"].items()]
            have = {kind: sum(resources.get(kind, 0.0) for resources in there) for kind in ("CPU", "GPU")}
            tied = {key: pool for key, pool in pools.items() if pool.label == label}
            if not there:
                raise ConfigError(
                    f"{name}, {' and '.join(tied)}: no node of the cluster has the label {label}",
                    Exit.CLUSTER,
                )
            _check_pools(name, tied, have, f"the part with label {label}")


def _check_pools(work: str, pools: dict[str, Pool], have: dict[str, float], where: str) -> None:
    needed = {
        "CPU": {name: pool.count * pool.cpus for name, pool in pools.items()},
        "GPU": {name: pool.count * pool.gpus for name, pool in pools.items()},
    }
    for kind, amounts in needed.items():
        need = {name: amount for name, amount in amounts.items() if amount}
        if sum(need.values()) > have.get(kind, 0.0) + 1e-9:
            parts = " + ".join(f"{amount:g} for {name}" for name, amount in need.items())
            raise ConfigError(
                f"{work} needs {sum(need.values()):g} {kind}s ({parts}), {where} has {have.get(kind, 0.0):g}. "
                f"Ask for fewer or for fewer {kind}s each, or use a larger cluster",
                Exit.CLUSTER,
            )
