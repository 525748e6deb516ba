"""What is written when a stage ends."""

from __future__ import annotations

import shutil
import time

from kforcing.loading import load_tokenizer
from pipelines.data.tokenise import Prepared
from pipelines.runs.stages import Stage
from pipelines.tracking.registry import model_files


def finish_stage(stage: Stage, prepared: Prepared) -> None:
    """Complete the folder of a stage whose model has been written, and mark the stage as finished.

    The tokenizer is written beside the model, so that the folder can be loaded alone. What only a resumed stage needs (the
    checkpoints, and Ray Train's record of them) is deleted. `manifest.json` comes last: it makes the stage finished.
    Before it, `training.worker.write_model` has written the model; after it, `Pipeline.student` evaluates and registers it.
    """
    load_tokenizer(prepared.tokenizer).save_pretrained(stage.folder)
    for leftover in ("checkpoints", "ray_train"):
        shutil.rmtree(stage.folder / leftover, ignore_errors=True)
    stage.finish(files=[file.name for file in model_files(stage.folder)], finished=time.time())
