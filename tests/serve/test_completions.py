"""Completions over HTTP, without Ray: the text, the stop, the usage and the seeds of answers."""

import concurrent.futures

import httpx
import pytest
import torch

from kforcing import PushForwardLM
from kforcing.engine import Engine, EngineConfig, Request, SamplingParams
from tests.endpoint import (
    EOS,
    LETTERS,
    complete,
    endpoint,
    events,
    expected,
    ids_of,
    metrics,
    save_model,
    text_of,
    without_eos,
)
from tests.models import make_backbone, make_sequential

pytestmark = pytest.mark.cluster


def test_a_token_limit_does_not_hide_an_earlier_stop_string_and_no_text_follows_it(http, student):
    seed, whole = without_eos(student, 11)
    for cap in range(1, 12):
        for at in range(cap):
            stop = whole[at]
            got = complete(http, seed=seed, max_tokens=cap, stop=stop, ignore_eos=True)["choices"][0]
            assert got["text"] == whole[: whole.index(stop)]
            assert (got["finish_reason"], got["stop_reason"]) == ("stop", stop)
        got = complete(http, seed=seed, max_tokens=cap, ignore_eos=True)["choices"][0]
        assert (got["text"], got["finish_reason"]) == (whole[:cap], "length")


def test_usage_counts_the_tokens_up_to_the_end_of_the_stop_string(http, student):
    seed, whole = without_eos(student, 11)
    for at in range(1, 10):
        stop = whole[at - 1 : at + 1]  # two tokens, inside and across blocks
        first = whole.index(stop)
        answer = complete(http, seed=seed, max_tokens=11, stop=[stop], ignore_eos=True)
        counts = {"prompt_tokens": 3, "completion_tokens": first + 2, "total_tokens": first + 5}
        assert answer["usage"].items() >= counts.items()
        assert answer["choices"][0]["text"] == whole[:first]


def test_a_seed_gives_the_same_text_alone_in_a_full_batch_and_from_generate(http, student):
    alone = complete(http, seed=7)["choices"][0]["text"]
    assert alone == text_of(expected(student, seed=7))
    assert alone == text_of(
        student.continue_prompts(torch.tensor([ids_of("abc")]), max_new_tokens=12, seed=7, eos_token_id=EOS)[0]
    )
    with concurrent.futures.ThreadPoolExecutor(33) as pool:
        bodies = [{"seed": 7}] + [
            {"seed": s, "prompt": "abcdefghij"[: 1 + s % 9], "max_tokens": 1 + s} for s in range(32)
        ]
        texts = list(pool.map(lambda body: complete(http, **body)["choices"][0]["text"], bodies))
    assert texts[0] == alone
    assert complete(http, seed=8)["choices"][0]["text"] != alone


def test_the_endpoint_returns_the_tokens_of_the_saved_student(http, student, tmp_path):
    student.save_pretrained(tmp_path)
    again = PushForwardLM.from_pretrained(tmp_path)
    for seed in range(5):
        assert complete(http, seed=seed)["choices"][0]["text"] == text_of(expected(again, seed=seed))


def test_prompts_may_be_text_token_ids_or_lists_of_either(http, student):
    text = complete(http)["choices"][0]["text"]
    assert complete(http, prompt=ids_of("abc"))["choices"][0]["text"] == text
    several = complete(http, prompt=["abc", "cab", "b"])
    assert [c["text"] for c in several["choices"]] == [text_of(expected(student, p)) for p in ("abc", "cab", "b")]
    assert several["usage"]["prompt_tokens"] == 7
    assert complete(http, prompt=[ids_of("abc"), ids_of("cab")])["choices"] == several["choices"][:2]


def test_the_choices_of_n_differ_and_are_repeatable(http):
    several = complete(http, n=4)["choices"]
    assert [c["index"] for c in several] == [0, 1, 2, 3]
    assert len({c["text"] for c in several}) > 1
    assert several[0]["text"] == complete(http)["choices"][0]["text"]
    assert several == complete(http, n=4)["choices"]
    streamed = ["", "", "", ""]
    for chunk in events(http, n=4):
        streamed[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert streamed == [c["text"] for c in several]


def test_without_a_seed_every_prompt_gets_its_own_seed(http):
    body = {"prompt": ["abc"] * 4, "max_tokens": 20, "ignore_eos": True}
    texts = [c["text"] for c in http.post("/v1/completions", json=body).json()["choices"]]
    assert len(set(texts)) > 1


def test_the_teacher_is_served_beside_the_student_and_a_request_may_choose_k(http, student):
    by_teacher = complete(http, model="teacher")["choices"][0]["text"]
    assert by_teacher == complete(http, k=1)["choices"][0]["text"]
    config = EngineConfig(max_num_seqs=1, max_model_len=56, coupling="gumbel")
    ar = Engine(student.backbone, config).generate([Request(ids_of("abc"), 12, 1, frozenset([EOS]))])
    assert by_teacher == text_of(ar[0].tokens)
    for k in (1, 2, 3, 4):
        assert complete(http, k=k)["choices"][0]["text"] == text_of(expected(student, k=k))


def test_a_stop_string_that_is_a_special_token_ends_the_text(http, student):
    seed, whole = next(
        (s, expected(student, seed=s, n=30, stop=frozenset()))
        for s in range(100)
        if EOS in expected(student, seed=s, n=30, stop=frozenset())[5:]
    )
    for stop in ("|", ["ZZ", "|"]):
        answer = complete(http, seed=seed, max_tokens=30, ignore_eos=True, stop=stop)
        choice = answer["choices"][0]
        assert choice["text"] == text_of(whole[: whole.index(EOS)])
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "|")
        assert answer["usage"]["completion_tokens"] == whole.index(EOS)
    part = http.post("/v1/completions", json={"prompt": "abc", "stop": "a|"})
    assert (part.status_code, part.json()["error"]["param"]) == (400, "stop")


def test_all_eos_ids_of_the_generation_config_end_the_text_of_student_and_teacher(tmp_path, student):
    letters = [LETTERS.index(c) for c in "ckq"]
    m = make_sequential(make_backbone())
    folder = save_model(tmp_path / "m", m, eos=letters)
    with endpoint(folder, max_model_len=56) as (url, _), httpx.Client(base_url=url) as http:
        for model in ("tiny", "teacher"):
            for seed in range(5):
                choice = complete(http, model=model, seed=seed, max_tokens=40)["choices"][0]
                ids = expected(m, n=40, seed=seed, k=1 if model == "teacher" else 4, stop=frozenset([EOS, *letters]))
                assert (choice["text"], choice["stop_reason"]) == (text_of(ids), None)
                assert (choice["finish_reason"] == "stop") == (len(ids) < 40)


def test_sampling_options_reach_the_engine(http, student):
    on, eos = {"ignore_eos": True}, frozenset([EOS])
    for fields, stops, sampling in (
        (on | {"logit_bias": {"3": 4.5, "0": -100}}, frozenset(), SamplingParams(logit_bias={3: 4.5, 0: -100.0})),
        (on | {"repetition_penalty": 9}, frozenset(), SamplingParams(repetition_penalty=9.0)),
        (on | {"min_p": 0.4, "temperature": 1.5}, frozenset(), SamplingParams(1.5, min_p=0.4)),
        ({"min_tokens": 9}, eos, SamplingParams(min_tokens=9)),
    ):
        requests = [Request(ids_of("abc"), 30, seed, stops, sampling=sampling) for seed in range(4)]
        done = Engine(student, EngineConfig(max_num_seqs=4, max_model_len=56)).generate(requests)
        got = [complete(http, seed=seed, max_tokens=30, **fields)["choices"][0]["text"] for seed in range(4)]
        assert got == [text_of(completion.tokens) for completion in done]
        assert got != [text_of(expected(student, n=30, seed=seed, stop=stops)) for seed in range(4)], fields


def test_no_stop_string_counts_in_the_text_of_the_first_min_tokens(http, student):
    seed, whole = without_eos(student, 11)
    for n in range(8):
        choice = complete(http, seed=seed, max_tokens=11, stop=[*whole], min_tokens=n, ignore_eos=True)["choices"][0]
        assert (choice["text"], choice["stop_reason"]) == (whole[:n], whole[n])


def test_the_stop_string_is_part_of_the_text_if_asked_for(http, student):
    seed, whole = without_eos(student, 11)
    stop, options = whole[4:6], {"max_tokens": 11, "ignore_eos": True, "include_stop_str_in_output": True}
    choice = complete(http, seed=seed, stop=stop, **options)["choices"][0]
    assert choice["text"] == whole[: whole.index(stop) + 2]
    seed = next(s for s in range(100) if EOS in expected(student, seed=s, n=11, stop=frozenset()))
    ended = complete(http, seed=seed, stop="|", **options)["choices"][0]["text"]
    assert ended == text_of(expected(student, seed=seed, n=11)) + "|"


def test_special_tokens_have_a_text_if_asked_for(http, student):
    seed = next(s for s in range(100) if EOS in expected(student, seed=s, n=11, stop=frozenset()))
    ids = expected(student, seed=seed, n=11, stop=frozenset())
    options = {"seed": seed, "max_tokens": 11, "ignore_eos": True}
    assert complete(http, **options)["choices"][0]["text"] == text_of(ids)
    literal = complete(http, skip_special_tokens=False, **options)["choices"][0]["text"]
    assert literal == "".join(LETTERS[i] for i in ids)
    stopped = complete(http, skip_special_tokens=False, stop="|", **options)["choices"][0]
    assert (stopped["text"], stopped["stop_reason"]) == (literal[: literal.index("|")], "|")


def test_a_prompt_may_be_cut_to_its_last_tokens(http):
    short = complete(http, prompt="cdefgh")
    cut = complete(http, prompt="ab" * 200 + "cdefgh", truncate_prompt_tokens=6)
    assert (cut["choices"], cut["usage"]) == (short["choices"], short["usage"])
    echoed = complete(http, prompt="abcdefgh", truncate_prompt_tokens=6, echo=True)["choices"][0]["text"]
    assert echoed == "cdefgh" + short["choices"][0]["text"]


def test_a_prompt_that_begins_like_an_earlier_one_is_not_read_again(http):
    def usage(prompt):
        body = {"model": "tiny", "prompt": prompt, "seed": 1, "max_tokens": 3}
        return http.post("/v1/completions", json=body).json()["usage"]["prompt_tokens_details"]

    prompt = "abcdefgh" * 5
    before = metrics(http)
    assert usage(prompt) == {"cached_tokens": 0}
    assert usage(prompt + "kk") == {"cached_tokens": 32}
    assert usage("k" + prompt) == {"cached_tokens": 0}
    name = next(name for name in metrics(http) if "prefix_cache_hits_total" in name and 'model="tiny"' in name)
    assert metrics(http)[name] - before[name] == 32
