"""Speed of the decode engine in fixed and exact mode, against `transformers` and llama.cpp.

command.py     the command line, and the loop in which all ways of decoding take turns
ways.py        what is compared: DecodingWay
rounds.py      one round of each kind of way: DecodingRound
simulation.py  drafts that are accepted at a chosen rate, for a model with random weights
hardware.py    what this machine does at its best, and the least time of a step
report.py      tables, checks, plot, benchmark.json, MLflow
"""
