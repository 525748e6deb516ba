"""Drafts from the context: what is found, which source is taken, and that the text is that of AR decoding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kforcing.coupling import inverse_cdf
from kforcing.engine import Engine, EngineConfig, Request, SamplingParams
from kforcing.engine.drafts import DraftSources, find_drafts
from kforcing.reference import decode
from tests.kforcing.engine.test_exact import alone, repeating_student
from tests.models import make_backbone, make_sequential


def searched(tokens, longest, count):
    """Slow and obvious: the drafts behind the latest of the longest matches, and the length of the match."""
    for n in range(min(longest, len(tokens) - 1), 0, -1):
        for at in range(len(tokens) - 2, n - 2, -1):
            if tokens[at - n + 1 : at + 1] == tokens[-n:]:
                following = tokens[at + 1 :]
                return [following[j % len(following)] for j in range(count)], n
    return None, 0


@settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=12), min_size=1, max_size=4),
    st.integers(1, 4),
    st.integers(0, 5),
)
def test_drafts_follow_the_latest_of_the_longest_occurrences(rows, longest, count):
    columns = max(map(len, rows)) + 1
    tokens_RC = torch.tensor([row + [row[-1]] * (columns - len(row)) for row in rows])
    end_R = torch.tensor([len(row) - 1 for row in rows])
    drafts_RJ, matched_R = find_drafts(tokens_RC, end_R, longest, count)
    assert drafts_RJ.shape == (len(rows), count)
    for row, drafts, matched in zip(rows, drafts_RJ.tolist(), matched_R.tolist(), strict=True):
        expected, n = searched(row, longest, count)
        assert matched == n
        if n:
            assert drafts == expected


def blocks(sources, own, found, matched, final):
    """Source of each of some blocks, whose three drafts are the student's or the context's and whose tokens are `final`."""
    taken = []
    for _ in range(8):
        drafts, source = sources.choose(torch.tensor([own]), torch.tensor([found]), torch.tensor([matched]))
        taken.append(source.item())
        right = next((j for j in range(3) if drafts[0, j] != final[j]), 3)
        sources.judge(torch.tensor([3]), torch.tensor([right + 1]), torch.tensor([final]))
    return taken


def test_the_source_whose_drafts_are_accepted_more_often_is_taken():
    final = [1, 2, 3, 4]
    sources = DraftSources(1, ngram=3, drafts=3, device=torch.device("cpu"))
    assert blocks(sources, [1, 2, 9], [1, 9, 9], 2, final) == [0] * 8
    assert blocks(sources, [9, 2, 3], [1, 2, 3], 2, final)[-1] == 2
    assert blocks(sources, [9, 2, 3], [1, 2, 3], 0, final) == [0] * 8  # nothing was found
    sources.join(0)
    assert blocks(sources, [9, 2, 3], [1, 2, 3], 1, final) == [0] + [1] * 7


def test_an_ar_model_takes_drafts_from_its_context(backbone):
    """Greedy decoding of a model that repeats one token for ever: k tokens a step once there is something to repeat."""
    m = repeating_student().backbone
    config = EngineConfig(k=4, max_num_seqs=1, max_model_len=60, acceptance="exact", adapt_width=False)
    engine = Engine(m, config)
    done = engine.generate([Request([2], 33, sampling=SamplingParams(temperature=0))])[0]
    assert done.tokens == [2] * 33
    assert done.steps == 9
    assert engine.stats.context_accepted == engine.stats.context_drafted == 24
    request = Request([1, 2, 3], 30, seed=4)
    engine = Engine(backbone, config)
    assert engine.generate([request])[0].tokens == decode(backbone, [1, 2, 3], 30, seed=4, coupling=inverse_cdf)


def test_steps_without_drafts_read_one_token():
    m = make_backbone(scale=4.0)
    engine = Engine(m, EngineConfig(k=4, max_num_seqs=1, max_model_len=60, acceptance="exact", adapt_width=False))
    seen = []
    step = engine._step
    engine._step = lambda shape: (seen.append(shape), step(shape))[1]
    engine.generate([Request([1, 2, 3], 30, seed=2)])
    drafted = engine.stats.drafted[0]
    assert 0 < drafted < len(seen) - 1
    assert [shape.read for shape in seen].count(1) == len(seen) - 1 - drafted
    assert all(shape.verify == (shape.read > 1) for shape in seen[1:])


def test_a_student_takes_better_drafts_from_the_context():
    """A student that repeats the prompt's cycle only through its context needs fewer steps with both sources."""
    m = make_sequential(make_backbone(scale=4.0), hints="none", draft="none").eval()
    request = Request([3, 1, 4], 50, sampling=SamplingParams(temperature=0))
    steps = {}
    for ngram in (0, 3):
        config = EngineConfig(
            max_num_seqs=1, max_model_len=60, acceptance="exact", adapt_width=False, context_ngram=ngram
        )
        engine = Engine(m, config)
        done = engine.generate([request])[0]
        assert done.tokens == alone(m.backbone, request, "gumbel", None)
        steps[ngram] = done.steps
    assert engine.stats.context_accepted > 0
    assert steps[3] < steps[0]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (EngineConfig(k=4), "k=4 of an AR model, which makes one token a step itself.*acceptance=exact"),
        (EngineConfig(k=4, acceptance="exact", context_ngram=0), "k=4 of an AR model.*context_ngram to at least 1"),
        (EngineConfig(k=0), "k=0 tokens a step"),
        (EngineConfig(context_ngram=-1), "context_ngram=-1 must be at least 0"),
    ],
)
def test_an_engine_without_a_source_of_drafts_is_refused(backbone, config, message):
    with pytest.raises(ValueError, match=message):
        Engine(backbone, config)


def test_a_fixed_request_of_an_ar_model_has_one_token_a_step(backbone):
    engine = Engine(backbone, EngineConfig(k=4, max_num_seqs=2, max_model_len=40, acceptance="exact"))
    request = Request([1, 2], 12, seed=4, acceptance="fixed")
    done = engine.generate([request, Request([1, 2], 12, seed=4)])
    assert done[0].steps == 12
    assert done[0].tokens == done[1].tokens == alone(backbone, request, "inverse_cdf", None)
    with pytest.raises(ValueError, match="k=2 tokens a step asked where 1 to 1"):
        engine.submit(Request([1, 2], 12, k=2, acceptance="fixed"))
