"""The width of a step: which one is chosen for given costs and acceptances, and that texts do not depend on it."""

import itertools
import random

import pytest

from kforcing.engine import Engine, EngineConfig, Request, SamplingParams
from kforcing.engine.graphs import CAPTURE_AT, Graphs
from kforcing.engine.width import ENOUGH_BLOCKS, FIRST_LOOK, LOOK_AGAIN, LOOK_SOON, WidthChooser
from tests.kforcing.engine.scenes import run_eagerly
from tests.kforcing.engine.test_exact import alone, student


def settled(chooser, requests, seconds, steps=400):
    """The width that is chosen most often when a step of width w takes `seconds[w]`."""
    chosen = []
    for _ in range(steps):
        width = chooser.choose([(0, chooser.k - 1)] * requests, 1, chooser.k)
        chosen.append(width)
        chooser.step(requests, width, seconds[width])
    return max(set(chosen), key=chosen.count)


def experienced(k, accepted):
    """A chooser of widths to k that has seen many blocks with so many accepted drafts."""
    chooser = WidthChooser(k)
    for _ in range(2000):
        chooser.block(k - 1, accepted)
    return chooser


def test_all_widths_are_timed_before_the_first_choice():
    chooser, chosen = WidthChooser(3), []
    for _ in range(3 * FIRST_LOOK):
        chosen.append(chooser.choose([(0, 2)], 1, 3))
        chooser.step(1, chosen[-1], 1.0)
    assert chosen == [3] * FIRST_LOOK + [2] * FIRST_LOOK + [1] * FIRST_LOOK


def test_the_widest_step_is_chosen_when_steps_cost_nearly_the_same_and_drafts_are_right():
    chooser = experienced(4, accepted=3)
    assert settled(chooser, 1, {1: 1.0, 2: 1.1, 3: 1.2, 4: 1.3}) == 4


def test_ar_decoding_is_chosen_when_drafts_are_wrong_or_arithmetic_binds():
    chooser = experienced(4, accepted=0)
    assert settled(chooser, 1, {1: 1.0, 2: 1.1, 3: 1.2, 4: 1.3}) == 1
    chooser = experienced(4, accepted=3)
    assert settled(chooser, 64, {1: 1.0, 2: 2.2, 3: 3.3, 4: 4.4}) == 1


def test_drafts_are_made_only_where_they_gain_more_than_a_few_percent():
    chooser = experienced(2, accepted=1)
    assert settled(chooser, 1, {1: 1.0, 2: 1.97}) == 1
    assert settled(chooser, 16, {1: 1.0, 2: 1.9}) == 2


def test_the_choice_depends_on_the_number_of_requests():
    chooser = experienced(2, accepted=1)
    assert settled(chooser, 1, {1: 1.0, 2: 1.2}) == 2
    assert settled(chooser, 16, {1: 1.0, 2: 2.5}) == 1
    assert settled(chooser, 1, {1: 1.0, 2: 1.2}, steps=50) == 2


def test_the_time_between_looks_at_a_width_doubles():
    chooser, looks = experienced(2, accepted=1), []
    for step in range(1000):
        width = chooser.choose([(0, 1)], 1, 2)
        chooser.step(1, width, 2.1 if width == 2 else 1.0)
        looks += [step] if width == 2 else []
    between = [after - before - 2 for before, after in itertools.pairwise(looks[2:])]
    assert between[:4] == [2 * LOOK_SOON, 4 * LOOK_SOON, LOOK_AGAIN, LOOK_AGAIN]


def test_looks_cost_little_where_wide_steps_take_as_long_as_several_narrow_ones():
    chooser, times, spent = experienced(4, accepted=1), {1: 1.0, 2: 1.8, 3: 2.8, 4: 3.85}, []
    for _ in range(2000):
        width = chooser.choose([(0, 3)] * 64, 1, 4)
        chooser.step(64, width, times[width])
        spent.append((times[width], chooser.tokens([(0, 3)] * 64, width) / 64))
    seconds, tokens = (sum(column) for column in zip(*spent, strict=True))
    best = max(chooser.tokens([(0, 3)], width) / times[width] for width in times)
    assert tokens / seconds > 0.97 * best


def test_a_width_that_was_not_chosen_is_timed_again():
    chooser = experienced(2, accepted=1)
    assert settled(chooser, 1, {1: 1.0, 2: 3.0}) == 1
    assert settled(chooser, 1, {1: 1.0, 2: 1.0}, steps=20 * LOOK_AGAIN) == 2


def test_a_step_that_was_held_up_does_not_change_the_choice_for_long():
    chooser = experienced(4, accepted=3)
    times = {1: 1.0, 2: 1.1, 3: 1.2, 4: 1.3}
    for width in times:
        for seconds in (9.0, times[width], times[width], 3 * times[width] if width == 4 else times[width]):
            chooser.step(1, width, seconds)
    assert settled(chooser, 1, times, steps=20) == 4


def test_times_from_when_the_machine_was_busy_are_forgotten_at_the_next_look():
    chooser = experienced(4, accepted=3)
    times = {1: 1.0, 2: 1.1, 3: 1.2, 4: 1.3}
    assert settled(chooser, 1, {width: time * 3 * width for width, time in times.items()}, steps=60) == 1
    settled(chooser, 1, times, steps=LOOK_AGAIN + 20)
    assert settled(chooser, 1, times, steps=50) == 4


def test_a_width_that_looked_a_little_too_slow_is_soon_timed_again():
    chooser = experienced(4, accepted=3)
    times = {1: 1.0, 2: 1.1, 3: 1.2, 4: 1.3}
    for width in times:
        for _ in range(FIRST_LOOK):
            chooser.step(1, width, times[width] * (1.4 if width == 4 else 1))
    assert settled(chooser, 1, times, steps=LOOK_SOON // 2) == 3
    assert settled(chooser, 1, times, steps=3 * LOOK_SOON) == 4


def test_limits_of_the_requests_bound_the_width():
    chooser = WidthChooser(4)
    assert chooser.choose([(0, 3)], 2, 2) == 2
    assert chooser.choose([(0, 3)], 4, 2) == 2
    assert chooser.choose([(0, 3)], 3, 4) == 4


def test_expected_tokens_follow_the_observed_acceptance():
    chooser, source = WidthChooser(3), random.Random(0)
    for _ in range(20_000):
        chooser.block(2, 2 if source.random() < 0.25 else 1 if source.random() < 2 / 3 else 0)
    assert chooser.tokens([(0, 2)], 1) == 1
    assert chooser.tokens([(0, 2)], 2) == pytest.approx(1.75, abs=0.15)
    assert chooser.tokens([(0, 2)], 3) == pytest.approx(2.0, abs=0.2)


@pytest.mark.parametrize(("accepted", "words"), [(0, "drafts hardly pay"), (1, "suspicious")])
def test_a_warning_is_given_once_when_acceptance_is_very_low_or_complete(accepted, words, caplog):
    chooser = WidthChooser(2)
    chooser.acceptance = [[float(accepted)]]
    for _ in range(2 * ENOUGH_BLOCKS):
        chooser.block(1, accepted)
    assert [words in record.message for record in caplog.records] == [True]


@pytest.mark.parametrize("seed", range(6))
def test_the_text_is_the_same_under_any_sequence_of_widths(seed):
    source = random.Random(seed)
    m = student("all hints", coupling=("gumbel", "inverse_cdf")[seed % 2])
    config = EngineConfig(max_num_seqs=3, max_model_len=60, acceptance="exact", check_every=1 + seed % 2)
    engine = Engine(m, config)
    engine.widths.choose = lambda drafts, least, most: source.randint(min(least, most), most)
    sampling = SamplingParams(temperature=(0.0, 0.8, 1.0)[seed % 3], frequency_penalty=seed % 2)
    requests = [Request([1 + i, 4, 2], 30 + i, seed=i, sampling=sampling) for i in range(5)]
    done = engine.generate(requests)
    coupling = m.config.design.coupling
    assert [c.tokens for c in done] == [alone(m.backbone, request, coupling, None)[:60] for request in requests]
    assert len(engine.stats.widths) > 1


def test_fixed_requests_keep_their_block_length_whatever_the_width_of_others():
    m = student("all hints")
    engine = Engine(m, EngineConfig(max_num_seqs=4, max_model_len=40, acceptance="exact"))
    fixed = Request([3, 1], 17, seed=2, k=3, acceptance="fixed")
    done = engine.generate([fixed, *(Request([i, 2], 20, seed=i) for i in range(3))])
    assert done[0].tokens == alone(m, fixed, "gumbel", 3)
    assert done[0].steps == 6


def test_a_shape_is_captured_at_its_third_use_and_only_replays_are_timed():
    engine = Engine(student("all hints"), EngineConfig(max_model_len=60, acceptance="exact"))
    graphs, timed = Graphs(engine.runner, capture=run_eagerly), []
    engine._step, engine._buckets = graphs, True
    engine.widths.step = lambda requests, width, seconds: timed.append(graphs.uses.total())
    engine.submit(Request([1, 2, 3], 55))
    calls = []  # whether each call replayed a graph, and whether it was timed
    while not engine.idle:
        uses, times = graphs.uses.total(), len(timed)
        engine.step()
        calls.append((graphs.uses.total() == uses, len(timed) > times))
    assert set(graphs.replays) == {shape for shape, uses in graphs.uses.items() if uses == CAPTURE_AT == 3}
    assert (True, True) in calls
    assert (False, True) not in calls
