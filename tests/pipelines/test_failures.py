"""Exit codes, and what lies behind the errors of libraries."""

import errno
import re
import signal
from pathlib import Path

import pytest
import torch
from ray.exceptions import OutOfDiskError, OutOfMemoryError, RayTaskError
from ray.train.v2.api.exceptions import WorkerGroupError

from pipelines.config.section import ConfigError
from pipelines.failures import Cause, Exit, Failure, cause_of, ending_in_one_line
from pipelines.runs.stages import StageError, hold
from tests.infra.manifests import ROOT

FULL = OSError(errno.ENOSPC, "No space left on device", "/run/k2/model.safetensors")
LIKE_OTHERS = (
    "error: the disk is full (OSError: [Errno 28] No space left on device: '/run/k2/model.safetensors'). Free space"
)


def of_a_task(error):
    """As it arrives from a task of a task."""
    inner = RayTaskError("read", "Traceback …", error, "p", 1, "127.0.0.1")
    return RayTaskError("outer", "Traceback …", inner, "p", 1, "127.0.0.1").as_instanceof_cause()


def how_it_ends(error, capsys):
    """The exit code of a command that raises this error, and its last line."""
    with pytest.raises(SystemExit) as ended, ending_in_one_line():
        raise error
    return ended.value.code, capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigError("train.steps=0"), 2, "error: train.steps=0"),
        (ConfigError("no cluster", Exit.CLUSTER), 3, "error: no cluster"),
        (StageError("it failed\nfor good"), 1, "error: it failed for good"),
        (StageError("it diverged", Exit.DIVERGED), 4, "error: it diverged"),
        (of_a_task(ConfigError("a.jsonl, line 3: no object")), 2, "error: a.jsonl, line 3: no object"),
        (KeyboardInterrupt(), 130, "interrupted; run the same command to continue"),
        (FULL, 5, LIKE_OTHERS),
        (of_a_task(FULL), 5, LIKE_OTHERS),
        (WorkerGroupError("two workers", {0: RuntimeError("peer"), 1: FULL}), 5, LIKE_OTHERS),
        (OSError(errno.EROFS, "Read-only file system", "/run"), 5, "error: the disk is read-only (OSError: [Errno 30]"),
        (OutOfDiskError("spilled"), 5, "error: the disk is full (OutOfDiskError"),
        (OutOfMemoryError("Task was killed"), 6, "error: the node has too little memory (OutOfMemoryError"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), 6, "error: the GPU has too little memory"),
    ],
)
def test_each_kind_of_failure_has_its_exit_code_and_one_line(error, code, line, capsys):
    ended, last = how_it_ends(error, capsys)
    assert ended == code
    assert last.startswith(line)


def test_a_fault_of_the_program_keeps_its_traceback():
    with pytest.raises(KeyError), ending_in_one_line():
        raise KeyError("a fault")


def test_an_error_that_was_dealt_with_is_not_taken_for_the_cause():
    def dealt_with():
        try:
            raise FULL
        except OSError:
            raise KeyError("another") from None

    with pytest.raises(KeyError) as error:
        dealt_with()
    assert cause_of(error.value) == Cause(Exit.FAILED, "KeyError: 'another'", known=False)


def test_the_worker_that_has_the_reason_is_named_and_not_the_one_that_lost_its_connection():
    for order in ((0, 1), (1, 0)):
        errors = (ValueError("wrong shape"), RuntimeError("Connection closed by peer"))
        failed = WorkerGroupError("two workers", {rank: errors[rank] for rank in order})
        assert cause_of(failed) == Cause(Exit.FAILED, "ValueError: wrong shape", known=False)


def test_an_unknown_error_is_shown_with_the_error_behind_it():
    error = ValueError("the hub cannot be reached")
    error.__cause__ = LookupError("no such name")
    shown = "ValueError: the hub cannot be reached, from LookupError: no such name"
    assert cause_of(error) == Cause(Exit.FAILED, shown, known=False)


def test_a_stopped_job_is_an_interruption_wherever_it_is_stopped(capsys):
    with pytest.raises(SystemExit) as ended, ending_in_one_line():
        signal.raise_signal(signal.SIGTERM)
    assert ended.value.code == Exit.INTERRUPTED
    assert capsys.readouterr().err == "interrupted; run the same command to continue\n"


def test_real_errors_of_full_disks_and_small_memories_are_known():
    for make in (
        lambda: torch.save(torch.zeros(9), "/dev/full"),
        lambda: Path("/dev/full").write_text("x"),
    ):
        with pytest.raises((OSError, RuntimeError)) as full:
            make()
        assert cause_of(full.value).exit_code == Exit.STORAGE, full.value
    for allocate in (lambda: torch.empty(1 << 50), lambda: bytearray(1 << 50)):
        with pytest.raises((RuntimeError, MemoryError)) as small:
            allocate()
        assert cause_of(small.value).exit_code == Exit.MEMORY, small.value


def test_a_run_directory_that_another_run_holds_has_a_code_of_its_own(tmp_path):
    with hold(tmp_path, "busy"), pytest.raises(ConfigError, match="busy") as error, hold(tmp_path, "busy"):
        pass
    assert error.value.exit_code == Exit.BUSY


@pytest.mark.parametrize("page", ["pipelines/README.md", "infra/RUNBOOK.md"])
def test_the_tables_of_exit_codes_are_complete(page):
    text = (ROOT / page).read_text()
    table = text[text.index("| exit code |") :].partition("\n\n")[0]
    assert [int(code) for code in re.findall(r"^\| (\d+) \|", table, re.M)] == [0, *(code.value for code in Exit)]


def test_failures_are_the_errors_that_people_understand():
    assert issubclass(ConfigError, Failure)
    assert issubclass(StageError, Failure)
