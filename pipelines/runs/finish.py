"""What is written when a stage ends."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from kforcing.conventions import CONVENTIONS
from kforcing.loading import load_tokenizer, save_tokenizer
from kforcing.remote import fetch
from pipelines.data.tokenise import Prepared
from pipelines.runs.stages import Stage, StageError
from pipelines.storage import push, remove, remove_file
from pipelines.tracking.registry import model_files


def finish_stage(stage: Stage, prepared: Prepared, teacher: Path | None = None) -> None:
    """Complete the folder of a stage whose model has been written, and mark the stage as finished.

    The tokenizer is written beside the model with the record of its conventions, so that the folder can be loaded alone. What
    only a resumed stage needs (the checkpoints, and Ray Train's record of them) is deleted. `manifest.json` comes last: it
    makes the stage finished. Before it, `training.worker.write_model` has written the model; after it, `Pipeline.student`
    evaluates and registers it.

    Args:
        teacher: folder of the AR model, whose conventions a student keeps; None for the AR model itself.
    Raises:
        StageError: when the student's tokenizer or EOS ids do not fit them.
    """
    fetch(stage.folder, without="checkpoints")  # another node may have written the model
    save_tokenizer(load_tokenizer(prepared.tokenizer), stage.folder)
    if teacher and (teacher / CONVENTIONS).is_file():  # an AR model of an earlier release has no record
        shutil.copy(teacher / CONVENTIONS, stage.folder)
        try:
            load_tokenizer(stage.folder)
        except ValueError as error:
            raise StageError(f"stage {stage.name}: {error}") from None
    for leftover in ("checkpoints", "ray_train", "stacks"):
        remove(stage.folder / leftover)
    remove_file(stage.folder / "failed.txt")
    files = model_files(stage.folder)
    for file in files:
        if file.suffix != ".safetensors":  # `write_model` has uploaded the weights
            push(file)
    stage.finish(files=[file.name for file in files], finished=time.time())
