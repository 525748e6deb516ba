"""Kernels for CPUs, written in LLVM's language and compiled for the machine at first use.

compiler.py   from text to a function that runs in torch's threads
products.py   a few rows times a weight matrix, at the speed of memory
pointwise.py  RMS norm, rotary positions, the gate of an MLP
race.py       the tokens that may win a Gumbel-max draw

Each has a way without it: where `llvmlite` or OpenMP is missing, torch does the same.
"""
