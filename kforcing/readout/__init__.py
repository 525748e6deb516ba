"""Read-outs: how the hidden states of one forward pass become k tokens."""
