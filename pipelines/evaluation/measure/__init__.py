"""What the parts of an evaluation measure: functions of (folder, measurement, results of other parts) that return JSON.

    measurement.py   what a part is about, and intervals over documents      prompts.py        held-out prompts
    text.py          the AR model's texts, each row's texts, Gen-PPL, MAUVE  joint.py          joint distribution of k tokens
    free_run.py      fidelity by distance from the prompt                    determinism.py    effect of precision and batch
    speed.py         tokens a second                                         flops.py          FLOPs of training and decoding
    judgement.py     verdicts of an LLM judge

Noise depends on seed and position alone. Therefore every decoder continues the same prompts under the same noise, and its
text can be compared with the AR model's token by token.
"""
