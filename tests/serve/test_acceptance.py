"""Exact and fixed mode, by deployment and by request."""

import dataclasses

import httpx
import pytest

from kforcing import PushForwardLM
from kforcing.reference import decode
from tests.endpoint import EOS, complete, endpoint, events, expected, ids_of, metrics, save_model, text_of
from tests.models import make_backbone

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    """A client of the student whose deployment chooses no mode."""
    folder = save_model(tmp_path_factory.mktemp("exact") / "model")
    with (
        endpoint(folder, acceptance="auto", max_num_seqs=4, max_model_len=56) as (url, service),
        httpx.Client(base_url=url, timeout=30) as client,
    ):
        engine = service.models["tiny"].engine
        engine.config = dataclasses.replace(engine.config, adapt_width=False)  # always k, whatever a step takes
        yield client


def of_the_ar_model(model, pick, seed, n=12, prompt="abc"):
    return text_of(decode(model, ids_of(prompt), n, seed=seed, coupling=pick, stop_ids=frozenset([EOS])))


def test_a_student_with_its_ar_model_gives_the_ar_models_text_unless_a_request_asks_for_fixed_mode(exact, student):
    differ = 0
    for seed in range(5):
        ar = of_the_ar_model(student.backbone, student.readout.pick, seed)
        fixed = text_of(expected(student, seed=seed))
        assert complete(exact, seed=seed)["choices"][0]["text"] == ar
        assert complete(exact, seed=seed, model="teacher")["choices"][0]["text"] == ar
        for k in (1, 2, 4):
            assert complete(exact, seed=seed, k=k)["choices"][0]["text"] == ar
        assert complete(exact, seed=seed, acceptance="fixed")["choices"][0]["text"] == fixed
        differ += ar != fixed
    assert differ


def test_usage_and_metrics_say_how_many_drafts_were_accepted_and_how_many_tokens_a_step_brought(exact):
    own = '{model="tiny",replica="test"}'
    names = ("engine_steps_total", "spec_decode_num_draft_tokens_total", "spec_decode_num_accepted_tokens_total")
    before = metrics(exact)
    body = {"max_tokens": 40, "ignore_eos": True, "seed": 3}
    usage = complete(exact, **body)["usage"]
    after = metrics(exact)
    decoding = usage["decoding"]
    grown = [after[f"kforcing_{name}{own}"] - before[f"kforcing_{name}{own}"] for name in names]
    assert grown == [decoding["steps"], decoding["draft_tokens"], decoding["accepted_draft_tokens"]]
    assert decoding["tokens_a_step"] == 40 / decoding["steps"] > 1
    # A step brings the AR model's own token and its accepted drafts; those of the last step may lie beyond the limit.
    assert 40 <= decoding["steps"] + decoding["accepted_draft_tokens"] < 44
    streamed = events(exact, stream_options={"include_usage": True}, **body)[-1]["usage"]
    assert streamed["completion_tokens"] == 40
    fixed = complete(exact, acceptance="fixed", **body)["usage"]["decoding"]
    assert fixed == {"steps": 10, "tokens_a_step": 4.0, "draft_tokens": 0, "accepted_draft_tokens": 0}


def test_an_argmax_student_decodes_in_fixed_mode_and_refuses_exact_mode_by_name(tmp_path):
    argmax = PushForwardLM.from_backbone(make_backbone(), 4)
    with endpoint(save_model(tmp_path / "m", argmax), acceptance="auto", max_model_len=40) as (url, _):
        body = {"prompt": "abc", "max_tokens": 8, "ignore_eos": True}
        answer = httpx.post(f"{url}/v1/completions", json=body).json()
        assert answer["usage"]["decoding"]["tokens_a_step"] == 4
        refused = httpx.post(f"{url}/v1/completions", json=body | {"acceptance": "exact"})
    assert refused.status_code == 400
    assert "acceptance=exact needs the AR model inside the student" in refused.json()["error"]["message"]


def test_an_ar_model_takes_drafts_from_the_context_in_exact_mode(tmp_path, student):
    folder = save_model(tmp_path / "m", student)
    student.backbone.save_pretrained(folder)
    body = {"prompt": "abcdabcd", "max_tokens": 40, "ignore_eos": True}
    answers = []
    for k in (None, 4):
        settings = {"acceptance": "auto", "k": k, "coupling": "gumbel", "max_model_len": 56}
        with endpoint(folder, **settings) as (url, service), httpx.Client(base_url=url) as http:
            engine = service.models["tiny"].engine
            engine.config = dataclasses.replace(engine.config, adapt_width=False)
            answers.append([complete(http, seed=seed, **body) for seed in range(3)])
    assert [a["choices"] for a in answers[0]] == [a["choices"] for a in answers[1]]
    assert {a["usage"]["decoding"]["tokens_a_step"] for a in answers[0]} == {1.0}
    assert max(a["usage"]["decoding"]["tokens_a_step"] for a in answers[1]) > 1
