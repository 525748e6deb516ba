"""Exact mode: whatever the drafts are, the text is that of AR decoding under the same noise."""

import functools
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kforcing import Design, NoiseConfig, PushForwardLM, SequentialConfig
from kforcing.engine import DraftCounts, Engine, EngineConfig, Request, SamplingParams
from kforcing.engine.graphs import Graphs
from kforcing.reference import decode
from tests.kforcing.engine.scenes import run, run_eagerly
from tests.models import CONFIGS, VOCAB, make_backbone, make_sequential

PARTS = {
    "all hints": {},
    "one hint layer, bigram drafts, shortlist": {"hint_layers": 1, "shortlist": 8, "draft": "bigram"},
    "adapters": {"hints": "adapter"},
    "shortlist without drafts": {"shortlist": 5, "draft": "none"},
    "head alone": {"hints": "none", "draft": "none"},
}
AR = "no student, drafts from the context"


@functools.cache
def student(parts, name="llama", coupling="gumbel"):
    """A student whose drafts are wrong now and then."""
    if parts == AR:
        return make_backbone(name, scale=4.0)
    return make_sequential(make_backbone(name, scale=4.0), coupling=coupling, **PARTS[parts]).eval()


samplings = st.one_of(
    st.builds(SamplingParams, temperature=st.sampled_from([0.0, 0.5, 1.0])),
    st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.0, 0.7, 1.0]),
        top_p=st.sampled_from([0.6, 1.0]),
        top_k=st.sampled_from([0, 3]),
        frequency_penalty=st.sampled_from([0.0, 1.5]),
        presence_penalty=st.sampled_from([0.0, -1.0]),
        repetition_penalty=st.sampled_from([1.0, 1.3]),
        min_p=st.sampled_from([0.0, 0.3]),
        logit_bias=st.sampled_from([{}, {1: 5.0, 3: -100.0}]),
        min_tokens=st.sampled_from([0, 7]),
    ),
)


@st.composite
def scenes(draw):
    """Parts, backbone and coupling of a student, an engine, and requests with the step they come and are cancelled at.

    The seed of the widths is None where the engine chooses them.
    """
    parts = draw(st.sampled_from([*PARTS, AR, AR]))
    which = parts, draw(st.sampled_from(list(CONFIGS))), draw(st.sampled_from(COUPLINGS))
    config = EngineConfig(
        max_num_seqs=draw(st.integers(1, 4)),
        max_model_len=40,
        k=draw(st.integers(1, 4)),
        max_num_batched_tokens=draw(st.integers(1, 12)),
        check_every=draw(st.integers(1, 3)),
        batch_invariant=draw(st.booleans()),
        acceptance="exact" if parts == AR else draw(st.sampled_from(["exact", "fixed"])),
        coupling=which[2],
        context_ngram=draw(st.integers(1 if parts == AR else 0, 3)),
    )
    request = st.builds(
        Request,
        prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20),
        max_new_tokens=st.integers(1, 18),
        seed=st.integers(0, 3),
        stop_ids=st.frozensets(st.integers(0, VOCAB - 1), max_size=2),
        k=st.integers(1, config.k),
        sampling=samplings,
        acceptance=st.sampled_from(["exact", "exact", "fixed", None]),
    )
    requests = [
        replace(
            r,
            max_new_tokens=config.max_model_len - len(r.prompt) if draw(st.booleans()) else r.max_new_tokens,
            k=None if parts == AR and r.acceptance == "fixed" else r.k,
        )
        for r in draw(st.lists(request, min_size=1, max_size=6))
    ]
    arrivals = [draw(st.integers(0, 10)) for _ in requests]
    cancels = [draw(st.none() | st.integers(0, 12)) for _ in requests]
    widths = draw(st.none() | st.integers(0, 99))
    return which, config, draw(st.booleans()), widths, requests, arrivals, cancels


COUPLINGS = ("gumbel", "inverse_cdf")


@pytest.mark.long
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(scenes())
def test_exact_mode_gives_the_text_of_ar_decoding(scene):
    (parts, name, coupling), config, graphs, widths, requests, arrivals, cancels = scene
    m = student(parts, name, coupling)
    engine = Engine(m, config)
    if widths is not None:
        source = random.Random(widths)
        engine.widths.choose = lambda drafts, least, most: source.randint(min(least, most), most)
    if graphs:  # the shapes and bookkeeping of a GPU
        engine._step, engine._buckets = Graphs(engine.runner, capture=run_eagerly), True
    made, ends = run(engine, requests, arrivals, cancels)
    for i, request in enumerate(requests):
        exact = (request.acceptance or config.acceptance) == "exact"
        ar = m if parts == AR else m.backbone
        expected = alone(ar if exact else m, request, coupling, None if exact else request.k)
        if ends[i] is None:
            assert cancels[i] is not None
            assert made[i] == expected[: len(made[i])]
        else:
            assert made[i] == expected
            assert ends[i] == ("length" if len(expected) == request.max_new_tokens else "stop")


def alone(model, request, coupling, k):
    """The request by itself in an engine of its own: AR decoding for a backbone, fixed blocks of k for a student."""
    engine = Engine(model, EngineConfig(max_num_seqs=1, max_model_len=60, coupling=coupling, row_kernel=False))
    plain = Request(
        request.prompt, request.max_new_tokens, request.seed, request.stop_ids, k, request.sampling, "fixed"
    )
    return engine.generate([plain])[0].tokens


@pytest.mark.parametrize("parts", PARTS)
def test_exact_mode_equals_the_reference_loop(parts, backbone):
    m = make_sequential(backbone, **PARTS[parts]).eval()
    prompt = [1, 5, 2, 8]
    expected = decode(m, prompt, 20, seed=3, k=4, acceptance="exact")
    assert expected == decode(backbone, prompt, 20, seed=3, coupling=m.readout.pick)
    config = EngineConfig(max_num_seqs=1, max_model_len=40, acceptance="exact")
    assert Engine(m, config).generate([Request(prompt, 20, seed=3)])[0].tokens == expected


def test_greedy_exact_mode_is_greedy_decoding_of_transformers(backbone):
    m = make_sequential(backbone).eval()
    requests = [Request([3, 1, 4][:n], 14, sampling=SamplingParams(temperature=0)) for n in (1, 2, 3)]
    done = Engine(m, EngineConfig(max_num_seqs=2, max_model_len=30, acceptance="exact")).generate(requests)
    for request, completion in zip(requests, done, strict=True):
        ids = torch.tensor([request.prompt])
        theirs = backbone.generate(ids, do_sample=False, max_new_tokens=14, eos_token_id=None, pad_token_id=0)
        assert completion.tokens == theirs[0, len(request.prompt) :].tolist()


def test_drafts_that_are_always_right_bring_k_tokens_a_step():
    """A student with a copy of the whole trunk as hints and greedy repetition: see the accepted counts."""
    m = repeating_student()
    engine = Engine(m, EngineConfig(max_num_seqs=1, max_model_len=60, acceptance="exact", adapt_width=False))
    done = engine.generate([Request([2], 33, sampling=SamplingParams(temperature=0))])
    assert done[0].tokens == [2] * 33
    assert done[0].steps == 9  # the first step verifies nothing and returns one token; 8 steps return four
    assert engine.stats.accepted == engine.stats.drafted == [8, 8, 8]
    assert engine.stats.tokens_a_step == pytest.approx(33 / 9)


def repeating_student():
    """A student whose trunk repeats the last token for ever, and whose drafts do so too."""
    m = make_sequential(make_backbone(scale=0.0), hints="none", draft="none").eval()
    with torch.no_grad():
        m.backbone.model.embed_tokens.weight.copy_(torch.eye(VOCAB, 16).repeat(1, 1))
        m.backbone.model.norm.weight.fill_(1.0)
        m.backbone.lm_head.weight.copy_(torch.eye(VOCAB, 16))
        m.readout.correct.weight.zero_()
    return m


def test_wrong_drafts_cost_steps_and_no_tokens():
    m = student("head alone")
    config = EngineConfig(max_num_seqs=1, max_model_len=60, acceptance="exact", adapt_width=False)
    engine = Engine(m, config)
    done = engine.generate([Request([1, 2], 40, seed=5)])[0]
    assert len(done.tokens) == 40
    drafted, accepted = engine.stats.drafted, engine.stats.accepted
    assert drafted[0] == drafted[1] == drafted[2] == done.steps - 1
    assert drafted[0] > accepted[0] >= accepted[1] >= accepted[2]
    final = 1 + sum(accepted) + done.steps - 1  # the first step's token; then accepted drafts and AR's own next token
    assert final - engine.stats.discarded == 40


def test_statistics_count_a_draft_as_accepted_only_behind_accepted_ones():
    stats = DraftCounts()
    stats.count_block(drafted=3, accepted=2)
    stats.count_block(drafted=3, accepted=0)
    stats.count_block(drafted=1, accepted=1)
    stats.count_block(drafted=0, accepted=0)
    assert stats.drafted == [3, 2, 2]
    assert stats.accepted == [2, 1, 0]


@pytest.mark.parametrize(
    ("m", "message"),
    [
        (
            lambda: PushForwardLM.from_backbone(make_backbone(), 4, Design(noise=NoiseConfig(0.25, 32.0))),
            "readout=argmax",
        ),
        (
            lambda: PushForwardLM.from_backbone(
                make_backbone(), 4, Design("sequential", "gumbel", sequential=SequentialConfig(freeze_trunk=False))
            ),
            "freeze_trunk=False",
        ),
    ],
)
def test_a_student_without_its_ar_model_refuses_exact_mode(m, message):
    engine = Engine(m(), EngineConfig(max_num_seqs=1, max_model_len=30))
    with pytest.raises(ValueError, match=f"acceptance=exact needs the AR model inside.*{message}"):
        engine.submit(Request([1], 4, acceptance="exact"))
    with pytest.raises(ValueError, match="acceptance=exact needs the AR model"):
        Engine(m(), EngineConfig(acceptance="exact", adapt_width=False))


def test_an_unknown_acceptance_is_refused():
    with pytest.raises(ValueError, match="acceptance=lossy: choose one of exact, fixed"):
        Engine(student("head alone"), EngineConfig(acceptance="lossy"))


def test_each_request_has_its_own_counts_of_drafts():
    m = student("all hints")
    engine = Engine(m, EngineConfig(max_num_seqs=4, max_model_len=60, acceptance="exact", adapt_width=False))
    requests = [Request([1, 2, i], 30 + i, seed=i, k=2 + i) for i in range(3)]
    done = engine.generate([*requests, Request([1, 2], 20, acceptance="fixed")])
    for request, completion in zip(requests, done, strict=False):
        assert len(completion.drafts.drafted) == request.k - 1
        assert completion.drafts.drafted[0] == completion.steps - 1
        over = completion.steps + sum(completion.drafts.accepted) - len(completion.tokens)
        assert 0 <= over < request.k
        assert completion.tokens_a_step == len(completion.tokens) / completion.steps
    assert done[3].drafts == DraftCounts()
    assert engine.stats.drafted[0] == sum(c.drafts.drafted[0] for c in done[:3])
    assert sum(engine.stats.accepted) == sum(sum(c.drafts.accepted) for c in done[:3])
    assert sum(engine.stats.widths.values()) == engine.stats.steps


def test_later_steps_do_not_change_the_counts_of_an_output():
    engine = Engine(student("all hints"), EngineConfig(max_model_len=60, acceptance="exact", adapt_width=False))
    outputs = list(engine.stream(Request([1, 2], 20)))
    assert [sum(output.drafts.drafted[:1]) for output in outputs] == list(range(len(outputs)))


def test_a_stream_in_exact_mode_gives_one_to_k_tokens_a_step():
    m = student("all hints")
    engine = Engine(m, EngineConfig(max_num_seqs=2, max_model_len=60, acceptance="exact", adapt_width=False))
    sizes = [len(output.tokens) for output in engine.stream(Request([1, 2, 3], 40, seed=1))]
    assert sum(sizes) == 40
    assert sizes[0] == 1
    assert set(sizes) <= {1, 2, 3, 4}


@pytest.mark.parametrize("seed", range(4))
def test_drafts_are_accepted_up_to_the_last_position_of_the_context(seed):
    m = student("all hints")
    request = Request([1, 2, 3], 25, seed=seed)
    config = EngineConfig(max_num_seqs=1, max_model_len=28, acceptance="exact", adapt_width=False)
    assert Engine(m, config).generate([request])[0].tokens == alone(m.backbone, request, "gumbel", None)


def test_an_ar_model_accepts_the_option_and_decodes_as_before(backbone):
    config = EngineConfig(max_num_seqs=1, max_model_len=30)
    request = Request([1, 2], 10, seed=4)
    exact = Request([1, 2], 10, seed=4, acceptance="exact")
    engine = Engine(backbone, config)
    assert engine.generate([exact])[0].tokens == engine.generate([request])[0].tokens


def test_a_prompt_that_is_read_over_many_steps_is_untouched_by_the_drafts_of_its_slots_former_request():
    m = student("head alone")
    config = EngineConfig(
        max_num_seqs=2, max_model_len=60, max_num_batched_tokens=1, batch_invariant=True, acceptance="exact"
    )
    engine = Engine(m, config)
    first, short = Request([5, 3], 40, seed=1), Request([7], 6, seed=2)
    late = Request([2, 9, 4, 1, 8, 8, 3, 6, 0, 5, 11, 7], 12, seed=3)
    requests = [first, short, late]
    made, _ = run(engine, requests, [0, 0, 3], [None] * 3)
    assert made == [alone(m.backbone, request, "gumbel", None) for request in requests]
