"""Parts of an evaluation: named by the hash of their inputs, run as cluster tasks, kept when they are done.

part A ─┐
part B ─┴─► part C ─► …        every arrow is a result on disk; a killed evaluation begins with those that are missing
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.config.fingerprint import fingerprint
from pipelines.runs.stages import Stage, StageError, open_stage

Results = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """One unit of work."""

    name: str
    """Its folder, and how other parts call it."""
    inputs: tuple[Any, ...]
    """What its result depends on, beside the parts it needs."""
    run: Callable[..., Any]
    """(folder, job, results of the needed parts by name) → JSON."""
    job: Any
    needs: tuple[str, ...] = ()
    alone: bool = False
    """Nothing else may run: its result is a time."""


def run_parts(
    parts: list[Part], root: Path, say: Callable[[str], None], cpus: float, gpus: float, alone_cpus: float
) -> Results:
    """All results by part name. Earlier parts of the list start first, side by side as far as the cluster allows.

    Raises StageError for the first part that fails; what is finished stays.
    """
    import ray

    stages: dict[str, Stage] = {}
    keys: dict[str, str] = {}
    for part in parts:
        keys[part.name] = fingerprint(part.name, *part.inputs, *(keys[name] for name in part.needs))
        stages[part.name] = open_stage(root, part.name, keys[part.name])
    results = {part.name: m["result"] for part in parts if (m := stages[part.name].manifest)}
    if results:
        say(f"{len(results)} of {len(parts)} parts were finished before")
    started, todo = time.monotonic(), [p for p in parts if p.name not in results]
    running: dict[Any, Part] = {}
    at_once = max(1, int(ray.cluster_resources().get("CPU", 1.0) / cpus)) if cpus else len(parts)
    while todo or running:
        for part in _ready(todo, results, at_once - len(running), bool(running)):
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
            raise StageError(f"part {part.name} of the evaluation failed: {error.cause or error}") from error
        stages[part.name].finish(result=results[part.name], seconds=seconds)
        left = len(todo) + len(running)
        say(f"{part.name:<36}done in {seconds:.0f} s  ({left} to go, {time.monotonic() - started:.0f} s so far)")
    return {part.name: results[part.name] for part in parts}


def _ready(todo: list[Part], results: Results, places: int, busy: bool) -> list[Part]:
    """Parts to start now, in order, as many as there are places; those that want to be alone come last, one by one."""
    ready = [p for p in todo if all(name in results for name in p.needs)]
    together = [p for p in ready if not p.alone]
    if together or busy or any(not p.alone for p in todo):
        return together[: max(0, places)]
    return ready[:1]


def _run(part: Part, folder: str, given: Results) -> tuple[Any, float]:
    import torch

    torch.set_num_threads((os.cpu_count() or 1) if part.alone else 1)
    started = time.monotonic()
    result = part.run(Path(folder), part.job, given)
    return result, time.monotonic() - started
