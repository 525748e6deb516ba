"""Stages as units of work: named by the hash of their inputs, finished when their manifest is written.

    stage.json      {"fingerprint": …}, written when work begins
    manifest.json   fingerprint and facts, written atomically when it is finished

A folder of the same fingerprint with a manifest is finished and skipped; without one it is resumed. A folder of
another fingerprint is moved to `archive/` and comes back from there if the config changes back: nothing is deleted.
One whose fingerprint cannot be read is moved there as `<stage>-unmarked`, `<stage>-unmarked-2` and so on, and one of an
evaluation whose files have changed as `<stage>-changed`.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from kforcing.remote import address, fetch, listing, read_bytes, uri_of
from pipelines.config.recipes import FORMER_NAMES
from pipelines.config.section import ConfigError
from pipelines.failures import Exit, Failure
from pipelines.files import changed, checksum, read_json, write_json
from pipelines.log import log
from pipelines.storage import held, move, probe


class StageError(Failure, RuntimeError):
    """A stage failed for good; what it finished is kept."""


@dataclass(frozen=True)
class Stage:
    """One unit of work in a run directory."""

    name: str
    fingerprint: str
    folder: Path

    @property
    def manifest(self) -> dict[str, Any] | None:
        """The facts of a finished stage, or None."""
        return read_json(self.folder / "manifest.json")

    @property
    def checksums(self) -> dict[str, int]:
        """Of the files that its work has left, for a manifest; without files of lines (`.jsonl`), which may be added to."""
        files = (file for file in self.folder.rglob("*") if file.is_file())
        own = [f for f in files if f.name not in ("stage.json", "manifest.json") and f.suffix != ".jsonl"]
        return {str(file.relative_to(self.folder)): checksum(file) for file in own}

    def finish(self, **facts: Any) -> None:
        """Mark the stage as finished."""
        write_json(self.folder / "manifest.json", {"stage": self.name, "fingerprint": self.fingerprint, **facts})


def open_stage(root: Path, name: str, fingerprint: str) -> Stage:
    """The folder of a stage, with whatever the same inputs left there before."""
    folder, archive = root / name, root / "archive"
    found = _fingerprint_in(folder)
    if found != fingerprint:
        if folder.exists():
            place = _move_away(folder, archive, found or "unmarked")
            if not found:
                log.warning(
                    f"{folder} does not say which settings it was made with; it is now {place}, and the stage starts anew"
                )
        places = sorted(archive.glob(f"{name}-{fingerprint}*"))  # one that was not moved to its end has no fingerprint
        earlier = next((place for place in places if _fingerprint_in(place) == fingerprint), None)
        if earlier:
            move(earlier, folder)
        else:
            folder.mkdir(parents=True)
            write_json(folder / "stage.json", {"stage": name, "fingerprint": fingerprint})
    return Stage(name, fingerprint, folder)


def open_whole_stage(root: Path, name: str, fingerprint: str) -> Stage:
    """`open_stage`, of work whose manifest has `checksums`. If a file is not what it was, the work starts anew."""
    stage = open_stage(root, name, fingerprint)
    wrong = changed(stage.folder, (stage.manifest or {}).get("checksums", {}))
    if not wrong:
        return stage
    place = _move_away(stage.folder, root / "archive", "changed")
    log.warning(
        f"{stage.folder / wrong[0]} does not hold what was written to it; its folder is now {place}, and {name} starts anew"
    )
    return open_stage(root, name, fingerprint)


def _move_away(folder: Path, archive: Path, found: str) -> Path:
    """Keep the folder of other work in the archive, under a name that is free there, which is returned."""
    archive.mkdir(exist_ok=True)
    name = f"{folder.name}-{found}"
    places = (archive / (name if number == 1 else f"{name}-{number}") for number in count(1))
    place = next(place for place in places if not place.exists())
    move(folder, place)
    return place


def _fingerprint_in(folder: Path) -> str | None:
    """The fingerprint of the work in a folder; a finished stage has it twice."""
    records = (read_json(folder / name) for name in ("stage.json", "manifest.json"))
    return next((record["fingerprint"] for record in records if record), None)


def claim(root: Path, recipe: str) -> None:
    """Check that the run directory is new or belongs to this recipe. Raises ConfigError otherwise."""
    try:
        _check_place(root)
    except OSError as error:
        raise ConfigError(f"output_dir={root}: {error.strerror}; choose another output_dir", Exit.STORAGE) from None
    if uri := uri_of(root):
        _check_uri(uri, recipe)
    elif (root / "run.json").is_file():
        _check_owner(root, read_json(root / "run.json"), recipe)
    elif root.exists() and (not root.is_dir() or any(f.name != ".lock" for f in root.iterdir())):
        raise ConfigError(f"output_dir={root} exists and is not a run directory; choose an empty or new one")


def _check_uri(uri: str, recipe: str) -> None:
    """`claim`, of what is in object storage; nothing is fetched, because a run may be going on."""
    try:
        record = json.loads(read_bytes(f"{uri}/run.json") or b"null")
    except FileNotFoundError:
        if any(not name.startswith(("lease/", ".")) for name in listing(uri)):
            raise ConfigError(
                f"output_dir={uri} exists and is not a run directory; choose an empty or new one"
            ) from None
    else:
        _check_owner(uri, record, recipe)


def _check_owner(root: Path | str, record: dict[str, Any] | None, recipe: str) -> None:
    owner = (record or {}).get("recipe", recipe)
    if owner not in (recipe, FORMER_NAMES.get(recipe)):
        raise ConfigError(
            f"output_dir={root} belongs to a run of recipe {owner!r}, not {recipe!r}; its stages would be "
            "archived one by one. Choose another output_dir"
        )


def _check_place(root: Path) -> None:
    """Raise ConfigError unless a folder is there or can be made."""
    there = next(folder for folder in (root, *root.parents) if folder.exists())
    if not there.is_dir():
        raise ConfigError(f"output_dir={root}: {there} is a file, not a folder; choose another output_dir")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"output_dir={root}: {there} cannot be written to; choose another output_dir", Exit.STORAGE)


def hold(folder: Path, busy: str) -> AbstractContextManager[Any]:
    """Take a folder's lock and make the folder if it is not there; leaving the context releases the lock.

    Raises ConfigError with the text `busy` while another process holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / ".lock").acquire(timeout=0)
    except Timeout:
        raise ConfigError(busy, Exit.BUSY) from None
    except OSError as error:
        text = f"output_dir={folder} cannot be written to ({error.strerror}); choose another"
        raise ConfigError(text, Exit.STORAGE) from None


@contextmanager
def locked(root: Path, recipe: str) -> Iterator[None]:
    """Hold the run directory for this process. Raises ConfigError while another run holds it.

    In object storage it is held by a lease too, and its copy is brought up to date, without weights and checkpoints.
    """
    busy = f"output_dir={address(root)} is in use by another run; wait for it or choose another"
    probe(root)
    with hold(root, busy), held(root, busy):
        fetch(root, whole=False)
        write_json(root / "run.json", {"recipe": recipe, "id": run_id(root) or f"{root.name}-{uuid.uuid4().hex[:6]}"})
        yield


def run_id(root: Path) -> str | None:
    """The id of a run directory, which its log lines carry: made at the first start and kept. None before it."""
    return (read_json(root / "run.json") or {}).get("id")
