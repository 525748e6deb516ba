"""Parts of an evaluation: named by the hash of their inputs, run as cluster tasks, kept when they are finished.

part A ─┐
part B ─┴─► part C ─► …        every arrow is a result on disk; an evaluation that was killed runs only what is missing
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.config.fingerprint import fingerprint
from pipelines.failures import cause_of
from pipelines.log import belonging, log
from pipelines.runs.stages import Stage, StageError, open_whole_stage

Results = dict[str, Any]
"""JSON by the name of the part."""


@dataclass(frozen=True)
class Part:
    """One unit of work."""

    name: str
    """Its folder, and its name in the `needs` of other parts."""
    inputs: tuple[Any, ...]
    """What its result depends on, beside the parts that it needs."""
    run: Callable[..., Any]
    """(folder, task, results of the needed parts by name) → JSON."""
    task: Any
    """What `run` is about."""
    needs: tuple[str, ...] = ()
    """Names of the parts whose results it reads."""
    alone: bool = False
    """Whether nothing else may run at the same time, because its result is a time."""


def run_parts(parts: list[Part], root: Path, cpus: float, gpus: float, alone_cpus: float) -> Results:
    """Run the parts that are not finished, and return all results. Parts earlier in the list start first.

    Args:
        root: folder of the evaluation.
        cpus: Ray CPUs of a part. As many parts run at once as the cluster has room for.
        gpus: Ray GPUs of a part.
        alone_cpus: Ray CPUs of a part that must run alone.
    Raises:
        StageError: for the first part that fails. Finished parts stay finished.
    """
    import ray

    stages = _open(parts, root)
    results = {part.name: m["result"] for part in parts if (m := stages[part.name].manifest)}
    if results:
        log.info(f"{len(results)} of {len(parts)} parts were finished before")
    started, todo = time.monotonic(), [p for p in parts if p.name not in results]
    running: dict[Any, Part] = {}
    at_once = max(1, int(ray.cluster_resources().get("CPU", 1.0) / cpus)) if cpus else len(parts)
    while todo or running:
        for part in ready_parts(todo, results, at_once - len(running), bool(running)):
            given = {name: results[name] for name in part.needs}
            options = {"num_cpus": alone_cpus if part.alone else cpus, "num_gpus": gpus or None}
            task = ray.remote(max_retries=1, **options)(_run)
            running[task.remote(part, str(stages[part.name].folder), given)] = part
            todo.remove(part)
        done, _ = ray.wait(list(running))
        part = running.pop(done[0])
        try:
            results[part.name], seconds = ray.get(done[0])
        except ray.exceptions.RayTaskError as error:
            cause = cause_of(error)
            raise StageError(f"part {part.name} of the evaluation failed: {cause.text}", cause.exit_code) from error
        stage = stages[part.name]
        stage.finish(result=results[part.name], seconds=seconds, checksums=stage.checksums)
        left = len(todo) + len(running)
        took = f"done in {seconds:.0f} s  ({left} to go, {time.monotonic() - started:.0f} s so far)"
        with belonging(stage=part.name):
            log.info(f"{part.name:<36}{took}")
    return {part.name: results[part.name] for part in parts}


def _open(parts: list[Part], root: Path) -> dict[str, Stage]:
    """The folder of every part. Its fingerprint holds those of the parts that it needs, which come earlier in the list."""
    keys: dict[str, str] = {}
    for part in parts:
        keys[part.name] = fingerprint(part.name, *part.inputs, *(keys[name] for name in part.needs))
    return {name: open_whole_stage(root, name, key) for name, key in keys.items()}


def ready_parts(todo: list[Part], results: Results, places: int, busy: bool) -> list[Part]:
    """The parts to start now, in order and at most `places`. Parts that must run alone come last and one at a time.

    Args:
        results: of finished parts.
        places: parts that the cluster has room for beside those that run.
        busy: whether a part runs.
    """
    ready = [p for p in todo if all(name in results for name in p.needs)]
    together = [p for p in ready if not p.alone]
    if together or busy or any(not p.alone for p in todo):
        return together[: max(0, places)]
    return ready[:1]


def _run(part: Part, folder: str, given: Results) -> tuple[Any, float]:
    """The result of a part and the seconds that it took; runs in a cluster task."""
    import torch

    torch.set_num_threads((os.cpu_count() or 1) if part.alone else 1)
    started = time.monotonic()
    result = part.run(Path(folder), part.task, given)
    return result, time.monotonic() - started
