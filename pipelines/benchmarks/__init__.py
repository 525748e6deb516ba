"""Benchmarks: the decode engine, rollouts, the training step, and recipes at equal FLOPs."""
