"""Benchmark the decode engine against `transformers`: see `pipelines/benchmarks/engine.py`, and `--help`."""

from __future__ import annotations

from pipelines.benchmarks.engine import main

if __name__ == "__main__":
    main()
