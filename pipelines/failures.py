"""How a command ends when it fails: one line on stderr, and an exit code that says what kind of failure it was.

`cause_of` finds what lies behind an error of Ray or of a library: a `Failure`, a full or read-only disk, too little memory.
"""

from __future__ import annotations

import json
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum

from kforcing.remote import RemoteError
from pipelines.log import json_lines

INTERRUPTED = "interrupted; run the same command to continue"
LOST_PEER = r"[Cc]onnection (closed|reset)|by peer"
_REMOTE = f"{RemoteError.__module__}.{RemoteError.__name__}: "
LONGEST = 300
"""Characters of an error of a library that are shown."""


class Exit(IntEnum):
    """Exit codes of `distill.py`, `evaluate.py` and the benchmarks that train; the table is in `pipelines/README.md`."""

    FAILED = 1
    CONFIG = 2
    CLUSTER = 3
    DIVERGED = 4
    STORAGE = 5
    MEMORY = 6
    STALLED = 7
    BUSY = 8
    INTERRUPTED = 130


class Failure(Exception):
    """A failure that people understand from its text, which is one line that says what is wrong and what to do.

    Args:
        text: the line; line breaks in it become blanks.
        code: the exit code, where it is another than that of the class.
    """

    exit_code = Exit.FAILED

    def __init__(self, text: object, code: Exit | None = None):
        super().__init__(text)
        self.line = " ".join(str(text).splitlines())
        self.exit_code = code or type(self).exit_code

    def __str__(self) -> str:
        return self.line  # Ray appends lines to the arguments of exceptions


@dataclass(frozen=True)
class Kind:
    """Errors with one remedy."""

    exit_code: Exit
    signs: str
    """Regular expression that the kind and the text of such an error contain."""
    name: str
    remedy: str


KINDS = (
    Kind(
        Exit.MEMORY,
        r"ObjectStoreFullError|(No space|Cannot allocate|[Bb]us error).*/dev/shm|/dev/shm.*(No space|is full)",
        "the object store is full",
        "Give the nodes a larger /dev/shm, or lower rollout.steps_per_chunk",
    ),
    Kind(
        Exit.STORAGE,
        r"No space left on device|Disk quota exceeded|File too large|OutOfDiskError|PytorchStreamWriter|unexpected pos"
        r"|iostream error",
        "the disk is full",
        "Free space there (`df -h` shows how much there is) or raise its quota",
    ),
    Kind(
        Exit.STORAGE,
        r"Read-only file system",
        "the disk is read-only",
        "Mount it for writing, or move the run directory and give its new place in output_dir",
    ),
    Kind(Exit.STORAGE, r"Input/output error|Stale file handle", "the disk has failed", "Look at the disk or its mount"),
    Kind(
        Exit.MEMORY,
        r"CUDA out of memory|HIP out of memory",
        "the GPU has too little memory",
        "Lower train.micro_batch, train.loss_chunk or rollout.batch, or set train.activation_checkpointing=true",
    ),
    Kind(
        Exit.MEMORY,
        r"OutOfMemoryError|MemoryError|can't allocate memory|Cannot allocate memory|running low on memory",
        "the node has too little memory",
        "Lower train.micro_batch, rollout.batch, train.workers or rollout.actors, or use nodes with more memory",
    ),
)


@dataclass(frozen=True)
class Cause:
    """What lies behind an error."""

    exit_code: Exit
    text: str
    """One line, with the remedy where one is known; it ends without a full stop."""
    known: bool = True
    """False for an error that is neither a `Failure` nor of a known kind."""


def cause_of(error: BaseException) -> Cause:
    """The first of an error and those behind it that is a `Failure` or of a known kind.

    Without one, the first of them that Ray did not make, with what it came from. Where several workers have failed, one that
    lost the connection to another is left out: the other has the reason.
    """
    found = list(_behind(error))
    for each in found:
        if isinstance(each, Failure):
            return Cause(each.exit_code, each.line)
        if isinstance(each, RemoteError):
            return Cause(Exit.STORAGE, str(each))
        if known := _of_a_kind(_one_line(each)):
            return known
    for line in re.findall(r"^[\w.]+: .+", str(error), re.M):  # Ray Data keeps the text alone
        if known := _of_a_kind(line):
            return known
        if line.startswith(_REMOTE):
            return Cause(Exit.STORAGE, line.removeprefix(_REMOTE))
    lines = [_one_line(each) for each in found]
    lines = [line for line in lines if not re.search(LOST_PEER, line)] or lines
    behind = f", from {lines[-1][:LONGEST]}" if len(lines) > 1 and lines[-1] != lines[0] else ""
    return Cause(Exit.FAILED, lines[0][:LONGEST] + behind, known=False)


def _of_a_kind(line: str) -> Cause | None:
    """The cause that the kind and the text of an error stand for, if they are known."""
    for kind in KINDS:
        if re.search(kind.signs, line):
            return Cause(kind.exit_code, f"{kind.name} ({line[:LONGEST]}). {kind.remedy}")
    return None


def _behind(error: BaseException, seen: tuple[BaseException, ...] = ()) -> Iterator[BaseException]:
    """An error, then those that it was made from, without Ray's wrappers of an error of a task or a worker."""
    if error in seen:
        return
    wrapped = [*getattr(error, "worker_failures", {}).values(), *_attributes(error, "cause", "controller_failure")]
    if not wrapped:
        yield error
    context = [] if error.__suppress_context__ else _attributes(error, "__context__")
    for other in wrapped + _attributes(error, "__cause__") + context:
        yield from _behind(other, (*seen, error))


def _attributes(error: BaseException, *names: str) -> list[BaseException]:
    values = (getattr(error, name, None) for name in names)
    return [value for value in values if isinstance(value, BaseException)]


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


@contextmanager
def ending_in_one_line() -> Iterator[None]:
    """Turn failures and interruptions into one line on stderr and an exit code. Decorates the `main` of a command.

    An error that is none of those keeps its traceback and gives exit code 1. SIGTERM, which stops a job, is an interruption.
    """
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler) if main else None
    try:
        yield
    except KeyboardInterrupt:
        line, code = INTERRUPTED, Exit.INTERRUPTED
    except Exception as error:
        cause = cause_of(error)
        if not cause.known:
            raise
        line, code = f"error: {cause.text}", cause.exit_code
    else:
        return
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)
    print(json.dumps({"level": "error", "text": line}) if json_lines() else line, file=sys.stderr)
    sys.exit(code)
