"""Other ways to emit several tokens a pass, on the same backbone: what K-Forcing is measured against.

Each module trains one method and decodes it, small and plain; those that verify run on the engine's cache and layers.

    inversion.py   noise recovered from real text: causal hints (the paper's ablation B) or heads (A)
    medusa.py      heads that guess the following tokens, verified by the AR model in the same pass
    ptp.py         a noise-inversion student drafts, the AR model verifies under the same noise
    mdlm.py        masked diffusion, and why unmasking several positions a pass cannot be lossless
    assisted.py    `transformers` assisted generation with a small draft model
    rows.py        what the decoders share
"""
