"""Baselines: other methods that emit several tokens a pass, on the same backbone.

    assisted.py    assisted generation of `transformers` with a small draft model
    inversion.py   noise recovered from real text, with causal hints (the paper's ablation B) or with heads (A)
    mdlm.py        masked diffusion, and why it cannot be lossless when it unmasks several positions a pass
    medusa.py      heads that guess the following tokens, which the AR model verifies in its next pass
    ptp.py         a noise-inversion student drafts tokens, and the AR model verifies them under the same noise
    base.py        what all of them share: the `Decoder` protocol, batches of real text, decoding over the engine's cache

How to add a baseline:

1. Write a module here with two classes:
   * `…Step(nn.Module)`, whose `forward(batch: TextWindows) -> LossSums` is the training loss on real text;
   * `…Decoder`, whose `decode(prompts_RN, new_tokens, seeds) -> Decoded` continues prompts (see `base.Decoder`).
2. Add an entry to METHODS in `pipelines/evaluation/baselines.py`. It names the untrained model, the step, the decoder
   and the rows of the table, and `batch`, where the step reads other text than `sampled_windows` gives.

`pipelines/evaluate.py` then trains the baseline for the same FLOPs as the others and puts it in the table.
"""
