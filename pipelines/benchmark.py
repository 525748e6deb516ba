"""Benchmark the decode engine against `transformers`: see `pipelines/benchmarks/decoding/command.py`, and `--help`."""

from __future__ import annotations

from pipelines.benchmarks.decoding.command import main

if __name__ == "__main__":
    main()
