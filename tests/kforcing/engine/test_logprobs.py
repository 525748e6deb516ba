"""Log-probabilities: those of the model itself, aligned with the tokens, in every mode."""

import copy
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from kforcing import Design, NoiseConfig, PushForwardLM
from kforcing.engine import Engine, EngineConfig, Request, SamplingParams
from kforcing.engine.graphs import Graphs
from kforcing.keys import derive_key
from kforcing.modeling import one_window
from kforcing.noise import uniform
from tests.kforcing.engine.scenes import run_eagerly
from tests.kforcing.engine.test_exact import PARTS, student
from tests.models import CONFIGS, make_backbone, make_sequential

N = 5


@torch.no_grad()
def of_the_ar_model(backbone, prompt, tokens):
    """(L, V) log-probabilities of transformers' model at the place of each token."""
    logits = backbone(input_ids=torch.tensor([prompt + tokens]), use_cache=False).logits[0].float()
    return logits.log_softmax(dim=-1)[len(prompt) - 1 : -1]


def check(completion, expected_LV, n):
    assert len(completion.logprobs) == len(completion.tokens) == len(expected_LV)
    for token, entry, expected_V in zip(completion.tokens, completion.logprobs, expected_LV, strict=True):
        assert entry.logprob == pytest.approx(expected_V[token].item(), abs=1e-4)
        best = expected_V.topk(n).indices.tolist()
        assert list(entry.top) == best
        assert list(entry.top.values()) == pytest.approx(expected_V[best].tolist(), abs=1e-4)


SAMPLINGS = [
    SamplingParams(logprobs=N),
    SamplingParams(0.0, logprobs=0),
    SamplingParams(0.7, top_p=0.8, frequency_penalty=0.5, logprobs=2),
    SamplingParams(0.7),
]


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("parts", [None, *PARTS])
def test_exact_mode_returns_the_log_probabilities_of_the_ar_model(parts, graphs):
    m = make_backbone(scale=4.0) if parts is None else student(parts)
    config = EngineConfig(max_num_seqs=3, max_model_len=40, k=4, acceptance="exact", check_every=1 + graphs)
    engine = Engine(m, config)
    if graphs:
        engine._step, engine._buckets = Graphs(engine.runner, capture=run_eagerly), True
    requests = [Request([i + 1, 4, 2], 20 + i, seed=i, sampling=sampling) for i, sampling in enumerate(SAMPLINGS)]
    stop = Request([1, 4, 2], 30, 0, stop_ids=frozenset([3, 5]), sampling=SAMPLINGS[0])
    done = engine.generate([*requests, stop])
    assert sum(engine.stats.accepted) > 0, "some drafts are accepted"
    assert engine.stats.accepted != engine.stats.drafted, "and some are replaced"
    assert done[3].logprobs is None
    for request, completion in zip([*requests[:3], stop], [*done[:3], done[4]], strict=True):
        expected = of_the_ar_model(getattr(m, "backbone", m), request.prompt, completion.tokens)
        check(completion, expected, request.sampling.logprobs)


def test_ar_decoding_returns_the_log_probabilities_of_the_model(backbone):
    engine = Engine(backbone, EngineConfig(max_num_seqs=2, max_model_len=30))
    requests = [Request([1, 5, 2][:n], 12, seed=n, sampling=SamplingParams(logprobs=n)) for n in (1, 2, 3)]
    for request, completion in zip(requests, engine.generate(requests), strict=True):
        check(completion, of_the_ar_model(backbone, request.prompt, completion.tokens), request.sampling.logprobs)


@pytest.mark.parametrize("k", [1, 3, 4])
def test_fixed_mode_returns_the_log_probabilities_of_the_students_own_distributions(k):
    m = make_sequential(make_backbone()).eval()
    engine = Engine(m, EngineConfig(max_num_seqs=2, max_model_len=40))
    exact = Request([7], 20, seed=9, acceptance="exact")  # its drafts are verified in the same steps
    completion, _ = engine.generate([Request([1, 5, 2], 11, seed=3, k=k, sampling=SamplingParams(logprobs=N)), exact])
    ids, rows = [1, 5, 2], []
    while len(rows) < 11:
        noise = uniform(
            derive_key(3, "decode"), torch.zeros(1, dtype=torch.int64), 0, torch.arange(len(ids), len(ids) + k)
        )
        with torch.no_grad():
            made = m.draw(one_window(torch.tensor([ids]), noise[None]))
        rows += made.logits_BWKV[0, 0].float().log_softmax(dim=-1).unbind()
        ids += made.tokens_BWK[0, 0].tolist()
    assert completion.tokens == ids[3:14]
    check(completion, rows[:11], N)


@torch.no_grad()
@pytest.mark.parametrize("parts", [None, next(iter(PARTS))])
@pytest.mark.parametrize("acceptance", ["exact", "fixed"])
def test_the_tokens_of_a_prompt_have_the_log_probabilities_of_the_ar_model(parts, acceptance):
    m = make_backbone(scale=4.0) if parts is None else student(parts)
    k = 1 if parts is None else 4
    engine = Engine(
        m, EngineConfig(max_num_seqs=3, max_model_len=60, k=k, acceptance=acceptance, max_num_batched_tokens=7)
    )
    prompts = [[(3 * i + n) % 20 for i in range(n)] for n in (1, 2, 3, 5, 9, 30)]
    asked = [Request(p, 6, seed=i, sampling=SamplingParams(prompt_logprobs=i % 3)) for i, p in enumerate(prompts)]
    plain = [Request(p, 6, seed=i) for i, p in enumerate(prompts)]
    done, alone = engine.generate([*asked, plain[0]]), engine.generate(plain)
    assert done[-1].prompt_logprobs is None
    for prompt, n, completion, other in zip(prompts, (0, 1, 2, 0, 1, 2), done, alone, strict=False):
        assert completion.tokens == other.tokens
        expected_LV = of_the_ar_model(getattr(m, "backbone", m), prompt[:1], prompt[1:])
        assert len(completion.prompt_logprobs) == len(prompt) - 1
        for token, entry, expected_V in zip(prompt[1:], completion.prompt_logprobs, expected_LV, strict=True):
            assert entry.logprob == pytest.approx(expected_V[token].item(), abs=1e-4)
            assert list(entry.top) == expected_V.topk(n).indices.tolist()


def test_a_stream_and_a_cancelled_request_have_them_too(backbone):
    engine = Engine(backbone, EngineConfig(max_num_seqs=1, max_model_len=30))
    for output in engine.stream(Request([1, 2], 5, sampling=SamplingParams(logprobs=1))):
        assert [len(entry.top) for entry in output.logprobs] == [1] * len(output.tokens)
        assert all(entry.logprob <= max(entry.top.values()) + 1e-6 <= 1e-6 for entry in output.logprobs)


def test_more_likeliest_tokens_than_the_vocabulary_holds_are_all_of_them():
    config = copy.deepcopy(CONFIGS["llama"])
    config.vocab_size = 8
    m = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    engine = Engine(m, EngineConfig(max_num_seqs=1, max_model_len=20))
    entry = engine.generate([Request([1], 1, sampling=SamplingParams(logprobs=20))])[0].logprobs[0]
    assert sorted(entry.top) == list(range(8))
    assert math.fsum(map(math.exp, entry.top.values())) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("n", [-1, 21])
def test_a_number_out_of_range_is_refused(backbone, n):
    with pytest.raises(ValueError, match=f"logprobs={n}: ask for 0 to 20 likeliest tokens"):
        Engine(backbone, EngineConfig(max_model_len=20)).submit(Request([1], 2, sampling=SamplingParams(logprobs=n)))


def test_an_argmax_student_refuses_them():
    m = PushForwardLM.from_backbone(make_backbone(), 4, Design(noise=NoiseConfig(0.25, 32.0)))
    with pytest.raises(ValueError, match="logprobs=0: this student's noise picks tokens inside the network"):
        Engine(m, EngineConfig(max_model_len=20)).submit(Request([1], 2, sampling=SamplingParams(logprobs=0)))
