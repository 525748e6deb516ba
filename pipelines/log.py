"""Progress lines for the person who watches a run.

Modules write them to the standard library's logger `kforcing`. An entry point calls `show_progress` once; until then, and in
Ray's worker processes, nothing is printed.
"""

from __future__ import annotations

import logging
import re
import sys
from typing import TextIO

log = logging.getLogger("kforcing")


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


def _handler(stream: TextIO, layout: str) -> logging.Handler:
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter(layout))
    return handler
