"""Recipes and their parts at equal FLOPs: `python -m pipelines.benchmarks.compare`.

variants.py    what is compared: Variant, and TrainingJob, a variant with a seed
jobs.py        a job in a process of its own, until its FLOPs are spent
figures.py     what is measured of its students, on held-out documents
report.py      the table and the plot
step_costs.py  parameters, FLOPs and bytes of a decoding step, without training
"""
