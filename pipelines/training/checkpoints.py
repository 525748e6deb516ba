"""Which checkpoint of a stage is the newest whole one: files alone, without torch.

<stage>/checkpoints/latest.json              names the newest
<stage>/checkpoints/step-00000008/           a checkpoint, with its own record in latest.json
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from pipelines.files import changed, read_json, warn_once
from pipelines.log import log

LATEST = "latest.json"


def set_changed_aside(folder: Path) -> None:
    """Rename the newest checkpoint if a file of it does not hold what was written to it, and look at the one before.

    The whole checkpoint is read for it. A warning names the file and the checkpoint's new name.
    """
    while latest := latest_checkpoint(folder):
        place = folder / latest["tag"]
        wrong = changed(place, latest.get("crc32", {}))
        if not wrong:
            break
        aside = folder / f"changed-{place.name}"
        shutil.rmtree(aside, ignore_errors=True)
        place.rename(aside)
        (folder / LATEST).unlink(missing_ok=True)
        log.warning(
            f"{place / wrong[0]} does not hold what was written to it; the checkpoint is now {aside}, and an earlier one is "
            "used if there is one"
        )


def latest_checkpoint(folder: Path) -> dict[str, Any] | None:
    """`{"tag", "step", "world_size", …}` of the newest checkpoint whose files are all there and whole, or None."""
    places = [folder, *sorted(folder.glob("step-????????"), reverse=True)]
    for record in (read_json(place / LATEST) for place in places):
        if (
            record
            and re.fullmatch(r"step-\d{8}", record["tag"])
            and _whole(folder / record["tag"], record.get("bytes", {}))
        ):
            return record
    return None


def _whole(checkpoint: Path, sizes: dict[str, int]) -> bool:
    """Whether a checkpoint has files of these sizes; a warning names one that has not."""
    for name, size in sizes.items():
        file = checkpoint / name
        if not file.is_file() or file.stat().st_size != size:
            warn_once(
                f"{file} is missing or cut; the checkpoint is left aside, and an earlier one is used if there is one"
            )
            return False
    return checkpoint.is_dir()
