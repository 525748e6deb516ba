"""Which checkpoint of a stage is the newest whole one: files alone, without torch.

<stage>/checkpoints/latest.json              names the newest
<stage>/checkpoints/step-00000008/           a checkpoint, with its own record in latest.json
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from kforcing.remote import address, fetch, read_bytes, uri_of
from pipelines.files import changed, read_json, warn_once
from pipelines.log import log
from pipelines.storage import move, remove, remove_file, sizes

LATEST = "latest.json"


def set_changed_aside(folder: Path) -> None:
    """Rename the newest checkpoint if a file of it does not hold what was written to it, and look at the one before.

    The whole checkpoint is read for it. A warning names the file and the checkpoint's new name.
    """
    while latest := latest_checkpoint(folder):
        place = folder / latest["tag"]
        wrong = changed(fetch(place), latest.get("crc32", {}))
        if wrong and uri_of(place):  # the copy may be what has changed
            shutil.rmtree(place)
            wrong = changed(fetch(place), latest.get("crc32", {}))
        if not wrong:
            break
        aside = folder / f"changed-{place.name}"
        remove(aside)
        move(place, aside)
        remove_file(folder / LATEST)
        log.warning(
            f"{place / wrong[0]} does not hold what was written to it; the checkpoint is now {aside}, and an earlier one is "
            "used if there is one"
        )


def latest_checkpoint(folder: Path) -> dict[str, Any] | None:
    """`{"tag", "step", "world_size", …}` of the newest checkpoint whose files are all there and whole, or None."""
    there = sizes(folder)
    marks = sorted((name for name in there if re.fullmatch(rf"(step-\d{{8}}/)?{LATEST}", name)), reverse=True)
    for name in sorted(marks, key=lambda name: name != LATEST):
        record = _record(folder / name)
        if record and re.fullmatch(r"step-\d{8}", record["tag"]) and _whole(folder, record, there):
            return record
    return None


def _record(file: Path) -> Any:
    """`read_json`; of the copy of an object the object itself, which rank 0 may have written on another node."""
    return json.loads(read_bytes(file)) if uri_of(file) else read_json(file)


def _whole(folder: Path, record: dict[str, Any], there: dict[str, int]) -> bool:
    """Whether the checkpoint of a record has files of its sizes; a warning names one that has not."""
    for name, size in record.get("bytes", {}).items():
        if there.get(f"{record['tag']}/{name}") != size:
            warn_once(
                f"{address(folder / record['tag'] / name)} is missing or cut; the checkpoint is left aside, and an earlier "
                "one is used if there is one"
            )
            return False
    return (folder / record["tag"]).is_dir() or any(name.startswith(f"{record['tag']}/") for name in there)
