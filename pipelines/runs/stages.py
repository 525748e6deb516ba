"""Stages as units of work: named by the hash of their inputs, finished when their manifest is written.

    stage.json      {"fingerprint": …}, written when work begins
    manifest.json   fingerprint and facts, written atomically when it is finished

A folder of the same fingerprint with a manifest is finished and skipped; without one it is resumed. A folder of
another fingerprint is moved to `archive/` and comes back from there if the config changes back: nothing is deleted.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.config.schema import Config, ConfigError


class StageError(RuntimeError):
    """A stage failed for good; what it finished is kept."""


def write_json(path: Path, record: Any) -> None:
    """Write JSON atomically."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(record, indent=2))
    partial.rename(path)


@dataclass(frozen=True)
class Stage:
    """One unit of work in a run directory."""

    name: str
    fingerprint: str
    folder: Path

    @property
    def manifest(self) -> dict[str, Any] | None:
        """The facts of a finished stage, or None."""
        file = self.folder / "manifest.json"
        return json.loads(file.read_text()) if file.is_file() else None

    def finish(self, **facts: Any) -> None:
        """Mark the stage as finished."""
        write_json(self.folder / "manifest.json", {"stage": self.name, "fingerprint": self.fingerprint, **facts})


def open_stage(root: Path, name: str, fingerprint: str) -> Stage:
    """The folder of a stage, with whatever the same inputs left there before."""
    folder, archive = root / name, root / "archive"
    found = _fingerprint_in(folder)
    if found != fingerprint:
        if folder.exists():
            archive.mkdir(exist_ok=True)
            folder.rename(archive / f"{name}-{found or 'unmarked'}")
        earlier = archive / f"{name}-{fingerprint}"
        if earlier.exists():
            earlier.rename(folder)
        else:
            folder.mkdir(parents=True)
            write_json(folder / "stage.json", {"stage": name, "fingerprint": fingerprint})
    return Stage(name, fingerprint, folder)


def _fingerprint_in(folder: Path) -> str | None:
    file = folder / "stage.json"
    return json.loads(file.read_text())["fingerprint"] if file.is_file() else None


def claim(config: Config) -> None:
    """Check that the run directory is new or belongs to this recipe. Raises ConfigError otherwise."""
    root, marker = config.root, config.root / "run.json"
    if marker.is_file():
        owner = json.loads(marker.read_text())["recipe"]
        if owner != config.recipe:
            raise ConfigError(
                f"output_dir={root} belongs to a run of recipe {owner!r}, not {config.recipe!r}; its stages would be "
                "archived one by one. Choose another output_dir"
            )
    elif root.exists() and (not root.is_dir() or any(f.name != ".lock" for f in root.iterdir())):
        raise ConfigError(f"output_dir={root} exists and is not a run directory; choose an empty or new one")


@contextmanager
def exclusive(file: Path, wait: bool) -> Iterator[None]:
    """Hold a lock file for this process. Without `wait`, raises BlockingIOError when another process holds it."""
    with open(file, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield


@contextmanager
def locked(config: Config) -> Iterator[None]:
    """Hold the run directory for this process. Raises ConfigError while another run holds it."""
    config.root.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(exclusive(config.root / ".lock", wait=False))
        except BlockingIOError:
            raise ConfigError(
                f"output_dir={config.root} is in use by another run; wait for it or choose another"
            ) from None
        write_json(config.root / "run.json", {"recipe": config.recipe})
        yield
