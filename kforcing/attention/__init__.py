"""Attention over the windows of a sequence: one pass over the context serves all of them, at a cost of O(k) a window.

    windows.py     `Windows`, the places of a sequence at which blocks are made; `read_context`, the pass over the context
    reader.py      `BlockReader`, which reads the entries of the blocks through the layers of a model of transformers
    staircase.py   the attention of block entries to their context and to their own window, with its gradients

Start with `windows.py`. `reader.py` explains which entry sees what, and `staircase.py` how the kernels are called.
"""
