"""The evaluation that `pipelines/evaluate.py` runs: models of a finished run against baselines, in one report.

config.py              settings of an evaluation
subject.py             the models and data that are evaluated: a run directory, or a registered model
plan.py, parts.py      which parts there are; how parts run as cluster tasks and are kept when they are finished
decoders.py            one row of the table: a way to decode
baselines.py           METHODS: every method that is trained and decoded for comparison
baseline_training.py   how each of them is trained under one FLOP budget
heldout.py             fidelity on held-out windows, which the pipeline reports after every stage too
measure/               what each part measures, one module for each subject
judge.py               an LLM that compares pairs of texts
report/                report.json, tables in Markdown, plots, the page with texts side by side
"""
