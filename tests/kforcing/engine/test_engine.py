"""The engine against the loop without cache, and what it promises beyond tokens."""

import functools
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

from kforcing import Design, NoiseConfig, PushForwardLM
from kforcing.coupling import COUPLINGS
from kforcing.engine import Completion, Engine, EngineConfig, Request, SamplingParams
from kforcing.engine.graphs import Graphs
from kforcing.engine.layers import LeanStack, StockStack
from kforcing.engine.runner import ModelRunner
from kforcing.reference import decode
from tests.kforcing.engine.scenes import run, run_eagerly
from tests.models import CONFIGS, VOCAB, make_backbone, make_sequential

KINDS = {
    "ar": lambda name: make_backbone(name),
    "argmax": lambda name: PushForwardLM.from_backbone(make_backbone(name), 4, Design(noise=NoiseConfig(0.25, 32.0))),
    "sequential": lambda name: make_sequential(make_backbone(name)),
    "few hints": lambda name: make_sequential(
        make_backbone(name), coupling="inverse_cdf", hint_layers=1, shortlist=8, draft="bigram"
    ),
    "adapters": lambda name: make_sequential(make_backbone(name), hints="adapter"),
    "short of drafts": lambda name: make_sequential(make_backbone(name), shortlist=5, draft="none"),
    "head alone": lambda name: make_sequential(make_backbone(name), hints="none", draft="none"),
}


@functools.cache
def model(kind, name="llama"):
    return KINDS[kind](name).eval()


def slowly(m, request):
    """The reference's continuation."""
    return decode(
        m,
        request.prompt,
        request.max_new_tokens,
        seed=request.seed,
        k=request.k or getattr(m, "k", 1),
        temperature=request.sampling.temperature,
        stop_ids=request.stop_ids,
        coupling=COUPLINGS["inverse_cdf"],
    )


def prompt(n, seed=0):
    return torch.randint(0, VOCAB, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


@st.composite
def scenes(draw):
    """An engine, requests with the step they arrive at, and the steps after which some are cancelled."""
    kind = draw(st.sampled_from(list(KINDS)))
    most = 1 if kind == "ar" else 4
    config = EngineConfig(
        max_num_seqs=draw(st.integers(1, 4)),
        max_model_len=40,
        k=draw(st.integers(1, most)),
        max_num_batched_tokens=draw(st.integers(1, 12)),
        check_every=draw(st.integers(1, 3)),
        batch_invariant=draw(st.booleans()),
    )
    requests = draw(
        st.lists(
            st.builds(
                Request,
                prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20),
                max_new_tokens=st.integers(1, 15),
                seed=st.integers(0, 3),
                stop_ids=st.frozensets(st.integers(0, VOCAB - 1), max_size=2),
                k=st.integers(1, config.k),
            ),
            min_size=1,
            max_size=7,
        )
    )
    arrivals = [draw(st.integers(0, 10)) for _ in requests]
    cancels = [draw(st.none() | st.integers(0, 12)) for _ in requests]
    return kind, draw(st.sampled_from(list(CONFIGS))), config, draw(st.booleans()), requests, arrivals, cancels


@pytest.mark.long
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(scenes())
def test_engine_equals_the_loop_without_cache(scene):
    kind, name, config, graphs, requests, arrivals, cancels = scene
    m = model(kind, name)
    engine = Engine(m, config)
    if graphs:  # the shapes and bookkeeping of a GPU
        engine._step, engine._buckets = Graphs(engine.runner, capture=run_eagerly), True
    made, ends = run(engine, requests, arrivals, cancels)
    for i, request in enumerate(requests):
        expected = slowly(m, request)
        if ends[i] is None:
            assert cancels[i] is not None
            assert made[i] == expected[: len(made[i])]
        else:
            assert made[i] == expected
            assert ends[i] == ("length" if len(expected) == request.max_new_tokens else "stop")


def test_ar_mode_is_greedy_decoding_of_transformers(backbone):
    requests = [Request(prompt(n, n), 12, sampling=SamplingParams(temperature=0)) for n in (1, 3, 9)]
    done = Engine(backbone, EngineConfig(max_num_seqs=2, max_model_len=30)).generate(requests)
    for request, completion in zip(requests, done, strict=True):
        ids = torch.tensor([request.prompt])
        theirs = backbone.generate(ids, do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=0)
        assert completion.tokens == theirs[0, len(request.prompt) :].tolist()


def test_llama_relatives_take_the_lean_way_and_others_the_stock_one():
    stacks = {name: type(next(iter(decoder(name).stacks.values()))) for name in CONFIGS}
    assert stacks == {"llama": LeanStack, "qwen2": LeanStack, "gpt2": StockStack}


def decoder(name) -> ModelRunner:
    return Engine(model("ar", name), EngineConfig(max_num_seqs=2, max_model_len=20)).runner


@pytest.mark.parametrize("kind", ["ar", "argmax", "sequential"])
def test_a_request_does_not_depend_on_its_company(kind):
    m = model(kind)
    one = Request(prompt(9), 14, seed=5)
    alone = Engine(m, EngineConfig(max_num_seqs=1, max_model_len=40)).generate([one])[0]
    crowd = [Request(prompt(3 + i, i), 4 + i, seed=i) for i in range(12)]
    for slots, chunk in ((3, 2), (8, 100)):
        done = Engine(m, EngineConfig(max_num_seqs=slots, max_model_len=40, max_num_batched_tokens=chunk)).generate(
            [*crowd, one, *crowd]
        )
        assert done[12] == alone


def test_batch_invariant_mode_gives_equal_logits_in_half_precision():
    """Not only equal tokens: the same bits, alone and in a crowd."""
    m = make_backbone().bfloat16()
    seen = {}
    for label, crowd in (("alone", 0), ("crowd", 5)):
        engine = Engine(m, EngineConfig(max_num_seqs=6, max_model_len=40, batch_invariant=True))
        logits = []
        draw = engine.runner.sampler.draw
        engine.runner.sampler.draw = lambda x, z, t, keep=logits, draw=draw: (
            keep.append(x[0].clone()),
            draw(x, z, t),
        )[1]
        engine.generate([Request(prompt(9), 10, seed=5), *(Request(prompt(9, i), 10, seed=i) for i in range(crowd))])
        seen[label] = torch.stack(logits[:10])
    assert torch.equal(seen["alone"], seen["crowd"])


@pytest.mark.parametrize("kind", ["ar", "sequential"])
def test_top_k_and_top_p_cut_the_distribution(kind):
    m = model(kind)
    greedy = SamplingParams(temperature=0)
    for sampling in (SamplingParams(top_k=1), SamplingParams(top_p=1e-9)):
        many = [Request(prompt(5), 12, seed=s, sampling=sampling) for s in range(3)]
        one = Request(prompt(5), 12, sampling=greedy)
        done = Engine(m, EngineConfig(max_num_seqs=2, max_model_len=30)).generate([*many, one])
        assert all(c == done[-1] for c in done)


def test_options_of_one_request_leave_the_others_alone():
    m = model("sequential")
    plain = Request(prompt(5), 12, seed=3)
    special = Request(prompt(5), 12, seed=3, sampling=SamplingParams(0.5, top_k=4, top_p=0.9, frequency_penalty=1.0))
    config = EngineConfig(max_num_seqs=2, max_model_len=30)
    together = Engine(m, config).generate([special, plain])
    assert together[1] == Engine(m, config).generate([plain])[0]
    assert together[0] == Engine(m, config).generate([special])[0]
    assert together[0] != together[1]


@pytest.mark.parametrize("kind", ["ar", "argmax", "sequential"])
@pytest.mark.parametrize("name", ["frequency_penalty", "presence_penalty"])
def test_an_overwhelming_penalty_never_repeats_a_token(kind, name):
    m = model(kind)
    sampling = SamplingParams(**{name: 100.0})
    if kind != "argmax":  # one temperature is all this student knows
        sampling = SamplingParams(temperature=0.01, **{name: 100.0})
    for k in range(1, getattr(m, "k", 1) + 1):
        done = Engine(m, EngineConfig(max_num_seqs=1, max_model_len=40)).generate(
            [Request(prompt(5), 16, k=k, sampling=sampling)]
        )
        assert len(set(done[0].tokens)) == 16


@pytest.mark.parametrize("kind", ["ar", "argmax", "sequential"])
def test_no_stop_id_is_made_before_the_tokens_that_a_request_asks_for(kind):
    m, all_but_two = model(kind), frozenset(range(2, VOCAB))
    for k in range(1, getattr(m, "k", 1) + 1):
        requests = [
            Request(prompt(5), 16, seed, all_but_two, k, SamplingParams(min_tokens=n))
            for seed in range(3)
            for n in (0, 7)
        ]
        for request, done in zip(requests, engine_of(m).generate(requests), strict=True):
            n = request.sampling.min_tokens
            assert set(done.tokens) <= {0, 1}
            assert len(done.tokens) >= n
    for bias, n in (({3: 100.0}, 0), ({3: 100.0, 4: 50.0}, 5)):
        request = Request(prompt(5), 16, 1, frozenset([3]), sampling=SamplingParams(logit_bias=bias, min_tokens=n))
        assert engine_of(m).generate([request])[0].tokens == [4] * n


def engine_of(m):
    return Engine(m, EngineConfig(max_num_seqs=3, max_model_len=40))


def test_a_repetition_penalty_counts_the_prompt_too(backbone):
    request = Request(list(range(VOCAB - 4)), 1, sampling=SamplingParams(repetition_penalty=100.0, temperature=0.0))
    (made,) = engine_of(backbone).generate([request])[0].tokens
    with torch.no_grad():
        logits = backbone(input_ids=torch.tensor([request.prompt])).logits[0, -1]
    logits[: VOCAB - 4] = torch.where(logits > 0, logits / 100, logits * 100)[: VOCAB - 4]
    assert made == logits.argmax()


def test_a_penalty_counts_what_was_returned_and_nothing_else():
    """k' < k leaves tokens out; they must not be counted: AR and a sequential student at k'=1 agree."""
    student = model("few hints")
    sampling = SamplingParams(temperature=0.8, frequency_penalty=3.0)
    request = Request(prompt(5), 16, seed=2, k=1, sampling=sampling)
    mine = Engine(student, EngineConfig(max_num_seqs=1, max_model_len=40)).generate([request])
    assert mine == Engine(student.backbone, EngineConfig(max_num_seqs=1, max_model_len=40)).generate([request])


@pytest.mark.parametrize(
    ("kind", "request_", "message"),
    [
        ("ar", Request([], 4), "no tokens"),
        ("ar", Request([1, VOCAB], 4), f"prompt token {VOCAB} is outside the vocabulary of {VOCAB}"),
        ("ar", Request([1], 0), "max_new_tokens=0"),
        ("ar", Request([1] * 10, 11), "10 prompt tokens . 11 new ones exceed the context of 20"),
        ("ar", Request([1], 2, k=2), "k=2 tokens a step asked where 1 to 1"),
        ("ar", Request([1], 2, sampling=SamplingParams(temperature=-1)), "temperature=-1"),
        ("ar", Request([1], 2, sampling=SamplingParams(temperature=1e-310)), "too small to divide by"),
        ("ar", Request([1], 2, sampling=SamplingParams(temperature=float("nan"))), "temperature=nan"),
        ("ar", Request([1], 2, sampling=SamplingParams(top_p=0)), "top_p=0 leaves no token"),
        ("ar", Request([1], 2, sampling=SamplingParams(top_k=-1)), "top_k=-1"),
        ("ar", Request([1], 2, sampling=SamplingParams(min_tokens=-1)), "min_tokens=-1"),
        ("ar", Request([1], 2, sampling=SamplingParams(min_p=2)), "min_p=2"),
        ("ar", Request([1], 2, sampling=SamplingParams(repetition_penalty=0)), "repetition_penalty=0"),
        ("ar", Request([1], 2, sampling=SamplingParams(logit_bias={VOCAB: 1.0})), f"logit_bias of token {VOCAB}"),
        ("ar", Request([1], 2, sampling=SamplingParams(logit_bias={1: 1e9})), r"logit_bias.1.=10+"),
        ("argmax", Request([1], 2, sampling=SamplingParams(top_p=0.9)), "no distribution to cut"),
        ("argmax", Request([1], 2, sampling=SamplingParams(temperature=0)), "trained for 1.0 to 1.0"),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_reason(kind, request_, message):
    engine = Engine(model(kind), EngineConfig(max_num_seqs=1, max_model_len=20))
    with pytest.raises(ValueError, match=message):
        engine.submit(request_)
    assert engine.idle


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (EngineConfig(max_num_seqs=0), "max_num_seqs=0"),
        (EngineConfig(max_model_len=64), "the model reads 64 positions"),
        (EngineConfig(k=5), "k=5"),
        (EngineConfig(coupling="x"), "coupling=x"),
        (EngineConfig(row_kernel=True, compiled=True), "row_kernel=True"),
        (EngineConfig(graphs=True), "graphs=True needs a model on a GPU"),
        (EngineConfig(check_every=-1), "check_every=-1"),
    ],
)
def test_an_engine_that_cannot_be_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        Engine(model("argmax"), config)


def test_no_limit_means_as_much_as_the_context_holds():
    done = Engine(model("sequential"), EngineConfig(max_num_seqs=1, max_model_len=30)).generate([Request(prompt(7))])
    assert len(done[0].tokens) == 23


def test_a_stream_gives_k_tokens_a_step_and_can_be_left():
    m = model("sequential")
    engine = Engine(m, EngineConfig(max_num_seqs=2, max_model_len=40))
    request = Request(prompt(9), 10, seed=1)
    sizes, tokens = [], []
    for output in engine.stream(request):
        sizes.append(len(output.tokens))
        tokens += output.tokens
    assert sizes == [4, 4, 2]
    assert tokens == slowly(m, request)
    for _ in engine.stream(request):
        break
    engine.step()
    assert engine.idle


def test_streams_may_be_followed_together_and_cancelled():
    m = model("sequential")
    engine = Engine(m, EngineConfig(max_num_seqs=2, max_model_len=40))
    one, two = Request(prompt(9), 10, seed=1), Request(prompt(4), 14, seed=2)
    streams = [engine.stream(one), engine.stream(two)]
    made = [[token for output in stream for token in output.tokens] for stream in streams]
    assert made == [slowly(m, one), slowly(m, two)]
    for output in (stream := engine.stream(two)):
        engine.cancel(output.id)
    assert next(stream, None) is None
    engine.step()
    assert engine.idle


def test_a_bad_request_among_good_ones_queues_nothing():
    engine = Engine(model("ar"), EngineConfig(max_num_seqs=2, max_model_len=40))
    with pytest.raises(ValueError, match="no tokens"):
        engine.generate([Request([1], 2), Request([], 2)])
    assert engine.idle


@pytest.mark.parametrize("kind", ["mistral", "longrope"])
def test_the_context_ends_where_the_model_would_no_longer_be_itself(kind):
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 32,
    }
    if kind == "mistral":
        config = MistralConfig(**sizes, num_key_value_heads=2, sliding_window=12, max_position_embeddings=64)
    else:
        rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 12}
        rope |= {"short_factor": [1.0, 1.0], "long_factor": [4.0, 4.0]}
        config = LlamaConfig(**sizes, max_position_embeddings=64, rope_parameters=rope)
    m = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    with pytest.raises(ValueError, match="the model reads 12 positions"):
        Engine(m, EngineConfig(max_model_len=20))
    request = Request(prompt(5), 7, seed=1)
    crowd = [Request(prompt(2 + i), 8) for i in range(3)]
    done = Engine(m, EngineConfig(max_num_seqs=4)).generate([request, *crowd])
    assert done[0].tokens == slowly(m, request)


def test_the_draft_of_a_greedy_request_does_not_depend_on_its_seed():
    m = make_sequential(make_backbone(), draft="bigram")
    torch.nn.init.normal_(m.readout.bigram[1].weight)
    greedy = [Request(prompt(5), 12, seed=s, sampling=SamplingParams(temperature=0)) for s in range(4)]
    done = Engine(m, EngineConfig(max_num_seqs=4, max_model_len=30)).generate(greedy)
    assert done == [done[0]] * 4


def test_running_requests_go_on_while_a_long_prompt_is_read():
    engine = Engine(model("sequential"), EngineConfig(max_num_seqs=2, max_model_len=60, max_num_batched_tokens=5))
    first = engine.submit(Request(prompt(5), 30))
    engine.step()
    second = engine.submit(Request(prompt(35), 4))
    order = [output.id for _ in range(12) for output in engine.step()]
    assert order.index(second) >= 5, "31 tokens at 5 a step"
    assert order[:5] == [first] * 5


def test_the_cache_is_as_large_as_its_formula_says():
    engine = Engine(model("sequential"), EngineConfig(max_num_seqs=3, max_model_len=40))
    layers, heads, width = 2, 2, 4
    assert engine.runner.cache.bytes == 2 * layers * 3 * (40 + 4) * heads * width * 4


@pytest.mark.long
def test_memory_does_not_grow_over_2000_steps_of_joining_and_leaving():
    m = model("argmax")
    engine = Engine(m, EngineConfig(max_num_seqs=4, max_model_len=40))

    def work(steps):
        for step in range(steps):
            if step % 2 == 0:
                engine.submit(Request(prompt(1 + step % 20, step), 1 + step % 13, seed=step))
            engine.step()

    work(300)
    before = resident()
    work(2000)
    assert resident() - before < 4 * 2**20
    assert engine.stats.steps >= 2000


def resident():
    """Bytes of memory this process holds."""
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
def test_compiled_layers_decode_the_same():
    m, request = model("sequential"), Request(prompt(9), 14, seed=5)
    done = Engine(m, EngineConfig(max_num_seqs=2, max_model_len=40, compiled=True)).generate([request])
    assert done[0].tokens == slowly(m, request)


@pytest.mark.parametrize("row_kernel", [True, False])
@pytest.mark.parametrize("kind", ["ar", "argmax", "sequential", "adapters"])
def test_the_row_kernel_decodes_the_same_and_leaves_the_model_alone(kind, row_kernel):
    m, request = model(kind), Request(prompt(9), 14, seed=5)
    before = {type(module) for module in m.modules()}
    done = Engine(m, EngineConfig(max_num_seqs=2, max_model_len=40, row_kernel=row_kernel)).generate([request])
    assert done[0].tokens == slowly(m, request)
    assert {type(module) for module in m.modules()} == before


def test_equal_requests_are_equal_completions():
    done = Engine(model("ar"), EngineConfig(max_num_seqs=3, max_model_len=30)).generate([Request(prompt(4), 6)] * 5)
    assert done == [done[0]] * 5
    assert isinstance(done[0], Completion)


@pytest.mark.parametrize("kind", ["argmax", "sequential", "ar"])
def test_empty_slots_that_step_along_stay_within_their_columns(kind):
    config = EngineConfig(max_num_seqs=2, max_model_len=20, batch_invariant=True)
    engine = Engine(model(kind), config)
    for _ in range(4):  # the second slot is empty for more steps than it has columns
        (done,) = engine.generate([Request(prompt(4), 16, k=1, seed=1)])
        assert done.tokens == slowly(engine.model, Request(prompt(4), 16, k=1, seed=1))
