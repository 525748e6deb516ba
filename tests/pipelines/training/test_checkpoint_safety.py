"""Pickles that somebody else has put among the files of a run."""

import json
import os
import pickle
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from pipelines.files import checksum
from pipelines.runs.stages import StageError
from pipelines.training.worker import fit

pytestmark = pytest.mark.cluster


class Evil:
    """What would make a file when it is loaded."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def planted(folder, write):
    """A checkpoint whose record fits its files, as somebody who can write to the disk would make it."""
    place = folder / "checkpoints" / "step-00000005"
    place.mkdir(parents=True)
    file = place / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    write(file)
    files = {"bytes": {file.name: file.stat().st_size}, "crc32": {file.name: checksum(file)}}
    record = {"tag": place.name, "step": 5, "world_size": 1, **files}
    (folder / "checkpoints" / "latest.json").write_text(json.dumps(record))
    return file


@pytest.mark.parametrize("form", ["torch", "plain"])
def test_a_checkpoint_that_would_run_code_is_refused_in_one_line(tmp_path, form):
    marker = tmp_path / "marker"
    write = {
        "torch": lambda file: torch.save({"optimizer_state_dict": Evil(marker)}, file),
        "plain": lambda file: file.write_bytes(pickle.dumps(Evil(marker))),
    }[form]
    file = planted(tmp_path, write)
    train = SimpleNamespace(muon_lr=None)
    job = SimpleNamespace(
        folder=str(tmp_path), place=tmp_path, checkpoints=tmp_path / "checkpoints", stage="k2", train=train
    )
    reason = {"torch": "beside tensors it holds ", "plain": "it is not a file that torch.save wrote ("}[form]
    with pytest.raises(StageError, match="could run code") as error:
        fit(job, None)
    assert str(error.value).startswith(f"{file} is refused: {reason}")
    assert not marker.exists()


LOAD = """
import sys
from pipelines.training.deepspeed_engine import _import_deepspeed
_import_deepspeed()
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
TorchCheckpointEngine().load(sys.argv[1])
"""


def test_deepspeed_itself_loads_no_code_in_the_processes_of_a_run(tmp_path):
    marker, file = tmp_path / "marker", tmp_path / "evil.pt"
    torch.save({"x": Evil(marker)}, file)
    done = subprocess.run([sys.executable, "-c", LOAD, str(file)], capture_output=True, text=True, timeout=300)
    assert "Weights only load failed" in done.stderr
    assert not marker.exists()


def test_a_record_that_names_a_place_outside_of_the_checkpoints_is_left_aside(tmp_path):
    from pipelines.training.checkpoints import latest_checkpoint

    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "checkpoints").mkdir()
    record = {"tag": "../elsewhere", "step": 5, "world_size": 1}
    (tmp_path / "checkpoints" / "latest.json").write_text(json.dumps(record))
    assert latest_checkpoint(tmp_path / "checkpoints") is None
