"""What `pipelines/evaluate.py` measures.

config.py    what an evaluation can be told          subject.py   what is evaluated: a run directory or a registered model
parts.py     parts of the work, each finished once   measure.py   what each part measures
rivals.py    every other method, trained and decoded under the same budget
judge.py     an LLM that compares pairs of texts     report.py page.py   tables, plots, the side-by-side page
"""
