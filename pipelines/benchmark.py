"""Benchmark the decode engine against `transformers`: see `pipelines/benchmarks/engine.py`, and `--help`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pipelines.benchmarks.engine import main  # noqa: E402

if __name__ == "__main__":
    main()
