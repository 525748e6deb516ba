"""Training of one stage: Ray Train workers, the optimiser step, DeepSpeed, and a single-process trainer."""
