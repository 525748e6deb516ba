"""Full, read-only and small disks: real ones, in memory, of a size that tests choose."""

import logging
import subprocess

import pytest
import torch

from pipelines.config.section import ConfigError
from pipelines.data.tokenise import prepare
from pipelines.failures import Exit, cause_of
from pipelines.files import atomic_write, write_json
from pipelines.runs.cluster import _warn_of_small_memory
from pipelines.runs.stages import locked, open_stage
from pipelines.training.single_process import _keep, _resume
from tests.pipelines.data.test_tokenise import corpus_for, write_corpus

pytestmark = pytest.mark.cluster


class Disk:
    """A file system in memory."""

    def __init__(self, folder):
        self.folder = folder

    def change(self, options):
        """Mount it again with other options, such as `size=8m` or `ro`."""
        line = ["mount", "-o", f"remount,{options}", str(self.folder)]
        subprocess.run(line, check=True, capture_output=True, timeout=60)


@pytest.fixture
def disk(tmp_path):
    """A disk of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    line = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if subprocess.run(line, capture_output=True, timeout=60).returncode:
        pytest.skip("this machine permits no mounts")
    yield Disk(folder)
    subprocess.run(["umount", "-l", str(folder)], check=True, timeout=60)


def training(fill):
    """What a checkpoint of one process holds: 0.8 MB in all."""
    weights = [torch.nn.Parameter(torch.full((100_000,), fill))]
    return weights, [torch.optim.SGD(weights, 0.1)], [w.detach().clone() for w in weights]


def test_a_checkpoint_on_a_full_disk_is_named_keeps_the_one_before_and_is_written_once_there_is_space(disk):
    file = disk.folder / "k2.pt"
    disk.change("size=1300k")
    _keep(file, 1, 1.0, *training(1.0))
    with pytest.raises((OSError, RuntimeError)) as full:
        _keep(file, 2, 2.0, *training(2.0))
    cause = cause_of(full.value)
    assert cause.exit_code == Exit.STORAGE
    assert cause.text.startswith("the disk is full (")
    assert cause.text.endswith("Free space there (`df -h` shows how much there is) or raise its quota")
    assert [f.name for f in disk.folder.iterdir()] == ["k2.pt"]  # nothing half is left
    trained, optimizers, average = training(0.0)
    assert _resume(file, trained, optimizers, average)[0] == 1
    assert trained[0][0].item() == 1.0
    disk.change("size=8m")
    _keep(file, 2, 2.0, *training(2.0))
    assert _resume(file, trained, optimizers, average)[0] == 2


def test_a_stage_on_a_full_disk_is_not_finished_and_is_once_there_is_space(disk):
    stage = open_stage(disk.folder, "k2", "f00")
    filler = disk.folder / "filler"
    with pytest.raises(OSError, match="No space left"):
        atomic_write(filler, b"x" * (2 << 20))
    size = 1 << 20
    while size:  # fill what is left, to the last page
        try:
            (disk.folder / f"filler-{size}").write_bytes(b"x" * size)
        except OSError:
            size //= 2
    with pytest.raises(OSError, match="No space left") as full:
        stage.finish(figures=list(range(10_000)))
    assert cause_of(full.value).exit_code == Exit.STORAGE
    assert stage.manifest is None
    disk.change("size=8m")
    stage.finish(figures=[1])
    assert stage.manifest["figures"] == [1]


def test_a_read_only_disk_is_one_line_and_the_run_goes_on_once_it_is_mounted_for_writing(disk):
    root = disk.folder / "run"
    with locked(root, "smoke"):
        pass
    disk.change("ro")
    with pytest.raises(OSError, match="Read-only") as error:
        write_json(root / "report.json", {})
    assert cause_of(error.value).exit_code == Exit.STORAGE
    with (
        pytest.raises(ConfigError, match=r"cannot be written to \(Read-only file system\)") as refused,
        locked(root, "smoke"),
    ):
        pass
    assert refused.value.exit_code == Exit.STORAGE
    disk.change("rw")
    with locked(root, "smoke"):
        write_json(root / "report.json", {})


def test_a_corpus_on_a_full_disk_is_named_and_is_made_once_there_is_space(ray_here, disk, tmp_path):
    disk.change("size=32k")
    source = write_corpus(tmp_path / "corpus", "json")
    corpus = corpus_for(tmp_path, source, f"data.cache_dir={disk.folder}")
    with pytest.raises(Exception, match="No space left") as full:
        prepare(corpus)
    assert cause_of(full.value).exit_code == Exit.STORAGE
    disk.change("size=16m")
    assert prepare(corpus).facts()["train"]["documents"] > 90


def test_shared_memory_of_a_container_is_said_to_be_small(disk, caplog):
    disk.change("size=64m")
    with caplog.at_level(logging.WARNING):
        _warn_of_small_memory(disk.folder)
    (line,) = (record.getMessage() for record in caplog.records)
    assert line.startswith(
        f"{disk.folder} has 64 MiB, so Ray keeps objects on disk, which is slower; give the container"
    )
    disk.change("size=2g")
    _warn_of_small_memory(disk.folder)
    assert len(caplog.records) == 1
