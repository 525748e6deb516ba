"""Read-outs: how the hidden states of one forward pass become k tokens.

    base.py          `Readout`, the interface that training, evaluation and decoding use
    argmax.py        the paper's read-out: hint j carries the noise z_j, and token j is the argmax of its logits
    sequential.py    the read-out of the sequential recipe: AR trunk, parallel hints, a small head token by token
    head_block.py    the transformer block of that head
    hint_layers.py   the layers that its hints go through

`kforcing.modeling.build_readout` chooses one by the design of a student. To add another, implement `Readout`.
"""
