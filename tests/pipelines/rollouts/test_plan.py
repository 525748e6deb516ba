import hypothesis.strategies as st
import numpy as np
from hypothesis import given, settings

from pipelines.config.recipes import recipe
from pipelines.rollouts.plan import MAX_CHUNKS, StepPlan


def rows_of_steps(plan):
    """Positions each step takes over all workers, as streaming hands chunks to workers in turn."""
    steps: dict[int, list[int]] = {}
    for worker in range(plan.workers):
        mine = np.concatenate([plan.positions(c) for c in range(worker, plan.chunks, plan.workers)])
        for i, part in enumerate(mine.reshape(-1, plan.rows_per_worker)):
            steps.setdefault(plan.start + i, []).extend(part.tolist())
    return steps


def test_long_stages_have_a_bounded_number_of_chunks():
    config = recipe("lm1b")
    assert StepPlan.of(config.train, config.rollout, 0).chunks <= MAX_CHUNKS + config.train.workers


@settings(max_examples=60, deadline=None)
@given(
    workers=st.sampled_from([1, 2, 4]),
    per_worker=st.integers(1, 5),
    steps=st.integers(1, 30),
    data=st.data(),
    per_chunk=st.integers(1, 7),
)
def test_every_step_gets_its_rows_whatever_workers_chunks_and_restarts(workers, per_worker, steps, data, per_chunk):
    start = data.draw(st.integers(0, steps - 1))
    batch = workers * per_worker
    plan = StepPlan(batch, workers, steps, start, per_chunk)
    for step, rows in rows_of_steps(plan).items():
        assert sorted(rows) == list(range(step * batch, (step + 1) * batch))
    assert sorted(rows_of_steps(plan)) == list(range(start, steps))
