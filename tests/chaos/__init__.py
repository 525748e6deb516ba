"""The fault matrix: real runs of the pipeline, each with one fault, and what became of them.

    python -m tests.chaos [--output FOLDER] [--only WORDS] [--list]          (`make chaos`)

A cell is a fault: a component, the moment at which it is hit, and the way. Its run is a copy of a finished one without
its last stage, which is trained again while the fault happens. The same command is then given again until the run ends
well, as a user would, and its weights are compared bit by bit with those of a run that nothing disturbed.
"""
