"""Metrics: fidelity of a student to its teacher, quality of its text, and FLOPs.

fidelity.py   match and NLLs in held-out windows      diversity.py   distinct-n, repetition, entropy
joint.py      joint distribution of k tokens          external.py    the language model that reads texts
free_run.py   fidelity far from the prompt            gen_ppl.py     perplexity under it
flops.py      FLOPs and bytes of a decoding step      mauve.py       distance of two sets of texts
intervals.py  95% intervals over documents
"""
