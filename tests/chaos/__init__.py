"""The fault matrix: real runs of the pipeline that faults hit, and what became of them.

    python -m tests.chaos [--output FOLDER] [--only WORDS] [--list]          (`make chaos`)
    python -m tests.chaos --random N --seed S [--cached]                     N interruptions at random moments

A cell is a fault: a component, the moment at which it is hit, and the way. Its run is a copy of a finished one without
its last stage, which is trained again while the fault happens. The same command is then given again until the run ends
well, as a user would, and its weights are compared bit by bit with those of a run that nothing disturbed. Most of a cell's
time would go into starting Ray, so up to `TOGETHER` faults hit a run, one after the other, each once the run has recovered
from the one before.
"""
