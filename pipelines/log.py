"""Progress lines for the person who watches a run.

Modules write them to the standard library's logger `kforcing`. An entry point calls `show_progress` once; until then, and in
Ray's worker processes, nothing is printed. With KFORCING_LOG=json in the environment each line is a JSON object instead, with
the ids of its run and stage, as collectors of logs want it.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

log = logging.getLogger("kforcing")
ids: dict[str, str] = {}
"""The `run` and the `stage` that the lines of this process belong to. The tracker of a run sets them; an evaluation names its
parts as stages."""


@contextmanager
def belonging(**which: str) -> Iterator[None]:
    """Inside, lines belong to this `run` or `stage`."""
    before = dict(ids)
    ids.update(which)
    try:
        yield
    finally:
        ids.clear()
        ids.update(before)


def show_progress() -> None:
    """Print progress lines to stdout as they are, and warnings to stderr with the word `warning` before them."""
    log.handlers = [_handler(sys.stdout, "%(message)s"), _handler(sys.stderr, "warning  %(message)s")]
    log.handlers[0].addFilter(lambda record: record.levelno < logging.WARNING)
    log.handlers[1].setLevel(logging.WARNING)
    log.setLevel(logging.INFO)
    log.propagate = False


_NAMED = "(?:abfss?|wasbs?|hdfs)"
_SECRET = "(?:password|passwd|secret_key|sig|token|X-Amz-Signature)"


def without_passwords(text: str) -> str:
    """The text with `***` for the user and the password of each URI in it, and for secrets in its query.

    What stands before the @ of an address of Azure or HDFS is a container or a user; with a colon it has a password, too.
    """
    text = re.sub(rf"(?<![\w+.-])(?!{_NAMED}://[^/?#\s:@]*@)([a-z][\w+.-]*://)[^/?#\s]*@", r"\1***@", text, flags=re.I)
    return re.sub(rf"([?&]{_SECRET}=)[^&#\s'\"]+", r"\1***", text, flags=re.I)


def json_lines() -> bool:
    """Whether lines are JSON objects, for collectors of logs."""
    return os.environ.get("KFORCING_LOG") == "json"


class _Json(logging.Formatter):
    """A line as a JSON object: time, level, ids, text."""

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created))
        return json.dumps({"time": when, "level": record.levelname.lower(), **ids, "text": record.getMessage()})


def _handler(stream: TextIO, layout: str) -> logging.Handler:
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_Json() if json_lines() else logging.Formatter(layout))
    return handler
