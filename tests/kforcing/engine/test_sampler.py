"""Rows that take only the way their options need draw what the one way for all rows draws."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kforcing.coupling import COUPLINGS
from kforcing.engine.request import SamplingParams
from kforcing.engine.runner import ARReadout
from kforcing.engine.sampler import Sampler

options = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 3, 40, 10_000]),
    top_p=st.sampled_from([1e-9, 0.3, 0.9, 0.999999, 1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    presence_penalty=st.sampled_from([0.0, -1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    min_p=st.sampled_from([0.0, 0.0, 0.05, 0.7, 1.0]),
    logit_bias=st.sampled_from([{}, {0: 3.0, 1: -100.0}]),
    min_tokens=st.sampled_from([0, 2, 10_000]),
)


def sampler_of(samplings, V, coupling, one_by_one):
    sampler = Sampler(len(samplings), V, ARReadout(COUPLINGS[coupling]), torch.device("cpu"))
    sampler.one_by_one = one_by_one
    for slot, sampling in enumerate(samplings):
        sampler.join(slot, sampling, torch.tensor([0, V - 1]), [1])
    return sampler


@settings(max_examples=150, deadline=None)
@given(
    st.lists(options, min_size=1, max_size=5),
    st.sampled_from([2, 23, 700, 3000]),
    st.sampled_from(list(COUPLINGS)),
    st.sampled_from([0.0, 1.0, 5.0]),
    st.sampled_from([None, 1.0]),
    st.integers(0, 10**6),
)
def test_each_rows_own_way_draws_the_same_token(samplings, V, coupling, spread, step, seed):
    R, g = len(samplings), torch.Generator().manual_seed(seed)
    logits = torch.randn(R, V, generator=g) * spread
    if step:
        logits = (logits / step).round() * step  # many ties
    z, counts = torch.rand(R, generator=g, dtype=torch.float64), torch.randint(0, 3, (R, V), generator=g).float()
    drawn = [sampler_of(samplings, V, coupling, way)(logits, z, counts).tolist() for way in (True, False)]
    assert drawn[0] == drawn[1]


def test_filters_keep_the_tokens_that_their_definition_names():
    V, g = 300, torch.Generator().manual_seed(0)
    logits = (torch.randn(V, generator=g) * 2).round()
    for top_k, top_p, temperature in ((0, 0.8, 1.0), (7, 1.0, 1.0), (20, 0.5, 0.7), (0, 0.99, 3.0)):
        p = (logits.double() / temperature).softmax(-1).tolist()
        order, kept, before = sorted(range(V), key=lambda v: (-p[v], v)), set(), 0.0
        for v in order[: top_k or V]:
            if before < top_p:
                kept.add(v)
            before += p[v]
        sampler = sampler_of([SamplingParams(temperature, top_k=top_k, top_p=top_p)] * 2000, V, "gumbel", True)
        z = torch.rand(2000, dtype=torch.float64, generator=g)
        drawn = set(sampler(logits.expand(2000, V), z, torch.zeros(2000, V)).tolist())
        assert drawn <= kept
        assert len(drawn) > 0.8 * len(kept)


@pytest.mark.parametrize("one_by_one", [True, False])
def test_bias_penalties_and_early_stops_change_the_logits_as_their_definitions_say(one_by_one):
    V, S = 6, SamplingParams
    logits = torch.tensor([[2.0, 1.9, 1.8, -1.0, -1.1, 0.0]])
    z, none = torch.tensor([0.5], dtype=torch.float64), torch.zeros(1, V)
    made = torch.tensor([[0.0, 0.0, 3.0, 0.0, 0.0, 0.0]])
    for options, counts, expected in (  # the prompt has the tokens 0 and 5, and token 1 is a stop id
        (S(0.0), none, 0),
        (S(0.0, logit_bias={3: 3.1}), none, 3),
        (S(0.0, logit_bias={0: -100.0}), none, 1),
        (S(0.0, logit_bias={0: -100.0}, min_tokens=1), none, 2),
        (S(0.0, logit_bias={0: -100.0}, min_tokens=3), made, 1),
        (S(0.0, repetition_penalty=1.2), none, 1),
        (S(0.0, repetition_penalty=1.2, min_tokens=4), made, 0),
        (S(0.0, logit_bias={0: -100.0, 1: -100.0, 2: -100.0, 5: -1.01}, repetition_penalty=1.2), none, 3),
        (S(1.0, min_p=0.95), none, 0),
    ):
        assert sampler_of([options], V, "gumbel", one_by_one)(logits, z, counts).tolist() == [expected], options


def test_min_p_keeps_the_tokens_that_its_definition_names():
    V, g = 300, torch.Generator().manual_seed(0)
    logits = torch.randn(V, generator=g) * 2
    p = (logits.double() / 0.7).softmax(-1)
    kept = set((p >= 0.05 * p.max()).nonzero().flatten().tolist())
    sampler = sampler_of([SamplingParams(0.7, min_p=0.05)] * 400, V, "gumbel", True)
    z = torch.rand(400, dtype=torch.float64, generator=g)
    drawn = set(sampler(logits.expand(400, V), z, torch.zeros(400, V)).tolist())
    assert drawn <= kept
    assert len(drawn) > 0.9 * len(kept)


@pytest.mark.parametrize("one_by_one", [True, False])
def test_plain_rows_draw_the_same_beside_rows_with_options(one_by_one):
    V, g = 500, torch.Generator().manual_seed(1)
    logits, z = torch.randn(4, V, generator=g) * 3, torch.rand(4, dtype=torch.float64, generator=g)
    plain = [SamplingParams(temperature=t) for t in (0.5, 1.0, 1.0, 2.0)]
    alone = sampler_of(plain, V, "gumbel", one_by_one)(logits, z, None)
    mixed = [plain[0], SamplingParams(top_p=0.1), SamplingParams(temperature=0), plain[3]]
    beside = sampler_of(mixed, V, "gumbel", one_by_one)(logits, z, torch.zeros(4, V))
    assert beside[[0, 3]].tolist() == alone[[0, 3]].tolist()
    assert beside[1] in logits[1].topk(5).indices
    assert beside[2] == logits[2].argmax()
