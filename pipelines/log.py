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
from typing import TextIO

log = logging.getLogger("kforcing")
ids: dict[str, str] = {}
"""The `run` and the `stage` that the lines of this process belong to; the tracker of the run sets them."""


def show_progress() -> None:
    """Print progress lines to stdout as they are, and warnings to stderr with the word `warning` before them."""
    log.handlers = [_handler(sys.stdout, "%(message)s"), _handler(sys.stderr, "warning  %(message)s")]
    log.handlers[0].addFilter(lambda record: record.levelno < logging.WARNING)
    log.handlers[1].setLevel(logging.WARNING)
    log.setLevel(logging.INFO)
    log.propagate = False


def without_passwords(text: str) -> str:
    """The text with `***` for the user and the password of each URI in it."""
    return re.sub(r"(://)[^/?#\s]*@", r"\1***@", text)


class _Json(logging.Formatter):
    """A line as a JSON object: time, level, ids, text."""

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created))
        return json.dumps({"time": when, "level": record.levelname.lower(), **ids, "text": record.getMessage()})


def _handler(stream: TextIO, layout: str) -> logging.Handler:
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_Json() if os.environ.get("KFORCING_LOG") == "json" else logging.Formatter(layout))
    return handler
