import json
import multiprocessing
import os
import re
import signal
import socket
import threading
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from kforcing.metrics.intervals import cluster_bootstrap
from pipelines.config.section import ConfigError
from pipelines.evaluation.judge import JudgeConfig, Pair, judge
from pipelines.runs.stages import StageError

pytestmark = pytest.mark.cluster
PAIRS = [
    Pair("Once", "short", "much longer"),
    Pair("Once", "the longer one", "short"),
    Pair("Twice", "a", "ab"),
    Pair("Thrice", "1", "123"),
]
PROBE = None


class Judge:
    """An endpoint on a free port. `answer(a, b, attempt)` gives text, or (status, body, headers)."""

    def __init__(self, answer, key=None, probe=None):
        self.answer, self.key, self.probe = answer, key, probe
        self.asked, self.bodies, self.lock = [], [], threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                outer.serve(self)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def serve(self, handler):
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        text = "".join(m["content"] for m in body["messages"])
        found = re.search(r"<A>\n(.*)\n</A>\n\n<B>\n(.*)\n</B>", text)
        question = found.groups() if found else PROBE
        with self.lock:
            attempt = self.asked.count(question)
            self.asked.append(question)
            self.bodies.append(body)
        status, content, headers = 200, "A", {}
        if handler.path != "/v1/chat/completions":
            status, content = 404, "no such path"
        elif self.key and handler.headers["Authorization"] != f"Bearer {self.key}":
            status, content = 401, "wrong key"
        elif question is not PROBE:
            content = self.answer(*question, attempt)
            if isinstance(content, tuple):
                status, content, headers = content
        choices = [{"message": {"role": "assistant", "content": content}}]
        if question is PROBE and self.probe is not None:
            choices = self.probe
        reply = {"choices": choices} if status == 200 else content
        handler.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(json.dumps(reply).encode())

    @property
    def questions(self):
        return [q for q in self.asked if q is not PROBE]


@contextmanager
def served(answer, **options):
    judge = Judge(answer, **options)
    thread = threading.Thread(target=judge.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield judge
    finally:
        judge.server.shutdown()
        judge.server.server_close()


def config(server, **options):
    return JudgeConfig(server.url, "judge", **{"timeout_s": 60, "workers": 3, **options})


def longer(a, b, attempt):
    return "A" if len(a) > len(b) else "B"


def test_a_judge_that_always_says_a_flips_every_pair(tmp_path):
    with served(lambda a, b, attempt: "A") as server:
        verdicts = judge(PAIRS, config(server), tmp_path / "verdicts.jsonl")
    assert (verdicts.win_rate, verdicts.flip_rate, verdicts.invalid) == (0.5, 1.0, 0)
    assert len(server.questions) == len(set(server.questions)) == 2 * len(PAIRS)


def test_an_honest_judge_is_counted_exactly(tmp_path, caplog):
    caplog.set_level("INFO")
    with served(longer) as server:
        verdicts = judge(PAIRS, config(server), tmp_path / "new" / "verdicts.jsonl")
    assert (verdicts.win_rate, verdicts.flip_rate, verdicts.invalid) == (0.75, 0.0, 0)
    assert verdicts.prompts == ("Once", "Twice", "Thrice")
    np.testing.assert_array_equal(verdicts.wins_P, [1, 1, 1])
    np.testing.assert_array_equal(verdicts.pairs_P, [2, 1, 1])
    sums = np.array([[1.0, 0], [1, 0], [1, 0]])
    order = [0, 2, 1]  # clusters are in the order of their names
    by_prompt = cluster_bootstrap(sums[order], np.array([2.0, 1, 1])[order], 50, 0)
    assert list(verdicts.intervals(50, 0).values()) == by_prompt
    by_document = cluster_bootstrap(np.array([[2.0, 0], [1, 0]]), np.array([3.0, 1]), 50, 0)
    assert list(verdicts.intervals(50, 0, ["a", "a", "b"]).values()) == by_document
    lines = [record.message for record in caplog.records if record.name == "kforcing"]
    assert lines[0] == "judge  4 pairs, 8 questions, 0 answered before"
    assert lines[-1].startswith("judge  8 of 8 answers")
    body = server.bodies[-1]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("judge", 0, 8)


def test_a_flaky_judge_is_asked_until_it_answers(tmp_path):
    def flaky(a, b, attempt):
        if a == "short" and attempt < 2:
            return 429, "slow down", {"Retry-After": "0.01"}
        if a == "a" and attempt == 0:
            return 503, "loading", {}
        if a == "1" and attempt == 0:
            return "I prefer B."
        return f" {longer(a, b, attempt)}\n"

    with served(flaky) as server:
        verdicts = judge(PAIRS, config(server), tmp_path / "verdicts.jsonl")
    assert (verdicts.win_rate, verdicts.flip_rate, verdicts.invalid) == (0.75, 0.0, 0)
    assert len(server.questions) == 8 + 2 + 2 + 1 + 1
    again = [body["messages"] for body in server.bodies if len(body["messages"]) > 2]
    assert [m["content"] for m in again[0][2:]] == ["I prefer B.", "Answer with exactly one letter: A or B."]


def test_garbage_twice_is_invalid_and_its_pair_does_not_count(tmp_path):
    with served(lambda a, b, attempt: "Both!" if a == "1" else longer(a, b, attempt)) as server:
        verdicts = judge(PAIRS, config(server), tmp_path / "verdicts.jsonl")
        assert verdicts.invalid == 1
        assert verdicts.win_rate == pytest.approx(2 / 3)
        np.testing.assert_array_equal(verdicts.pairs_P, [2, 1, 0])
        assert verdicts.intervals(100, 0)["win_rate"].value == pytest.approx(2 / 3)
        assert judge(PAIRS, config(server), tmp_path / "verdicts.jsonl").invalid == 1
    assert server.questions.count(("1", "123")) == 2
    with served(lambda a, b, attempt: "C") as server:
        nothing = judge(PAIRS, config(server), tmp_path / "garbage.jsonl")
    assert nothing.invalid == 8
    assert np.isnan([nothing.win_rate, nothing.flip_rate]).all()
    assert nothing.intervals(10, 0) == {}


def test_the_same_text_twice_is_a_draw_and_not_asked(tmp_path):
    with served(longer) as server:
        verdicts = judge([Pair("p", "x", "x"), Pair("p", "x", "xy")], config(server), tmp_path / "v.jsonl")
    assert (verdicts.win_rate, verdicts.flip_rate) == (0.75, 0.0)
    assert len(server.questions) == 2


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    pairs = [Pair(f"prompt {i}", "x" * i, "y" * (5 if i % 2 else 20)) for i in range(6, 16)]
    path, stuck, hang = tmp_path / "verdicts.jsonl", threading.Event(), threading.Event()

    def stops_after_seven(a, b, attempt):
        if not hang.is_set() and len(server.questions) > 7:
            stuck.set()
            hang.wait(120)
        return longer(a, b, attempt)

    with served(stops_after_seven) as server:
        one = config(server, workers=1)
        child = multiprocessing.get_context("spawn").Process(target=judge, args=(pairs, one, path))
        child.start()
        assert stuck.wait(120), "the first seven questions were not asked"
        os.kill(child.pid, signal.SIGKILL)
        child.join(60)
        hang.set()
        kept = [json.loads(line) for line in path.read_text().splitlines()]
        assert len(kept) == 7
        with open(path, "a") as file:
            file.write('{"key": "cut o')
        before = len(server.asked)
        verdicts = judge(pairs, config(server), path)
        later = server.asked[before:]
    assert len(later) == 1 + 20 - 7
    assert not {(r["a"], r["b"]) for r in kept} & set(later)
    assert verdicts.win_rate == 0.5
    assert verdicts.flip_rate == 0
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 20


def test_finished_verdicts_need_no_endpoint_and_another_judge_is_asked_anew(tmp_path):
    path = tmp_path / "verdicts.jsonl"
    with served(longer) as server:
        first = judge(PAIRS, config(server), path)
    again = judge(PAIRS, config(server), path)
    assert again.win_rate == first.win_rate
    with served(lambda a, b, attempt: "A") as other:
        assert judge(PAIRS, replace(config(other), model="other"), path).flip_rate == 1
        assert len(other.questions) == 8


def test_a_judge_that_fails_later_keeps_what_it_answered(tmp_path):
    path = tmp_path / "verdicts.jsonl"
    broken = threading.Event()
    broken.set()

    def breaks(a, b, attempt):
        return (500, "out of memory", {}) if a == "123" and broken.is_set() else longer(a, b, attempt)

    with served(breaks) as server:
        one = config(server, retries=2, workers=1)
        with pytest.raises(StageError, match=r"500.*out of memory.*start again"):
            judge(PAIRS, one, path)
        assert server.questions.count(("123", "1")) == 3
        broken.clear()
        assert judge(PAIRS, one, path).win_rate == 0.75
    assert server.questions.count(("short", "much longer")) == 1


def test_a_question_that_is_refused_ends_the_attempts_of_the_others(tmp_path):
    busy = threading.Event()

    def one_busy_one_refused(a, b, attempt):
        if a == "1":
            busy.set()
            return 503, "loading", {"Retry-After": "1"}
        assert busy.wait(60)
        return 400, "no", {}

    pairs = [Pair("Thrice", "1", "123")]
    with served(one_busy_one_refused) as server:
        with pytest.raises(StageError, match=r"400.*no.*start again"):
            judge(pairs, config(server, workers=2, retries=5), tmp_path / "verdicts.jsonl")
        assert server.questions.count(("1", "123")) < 6  # the attempts that follow meet a closed client
    assert (tmp_path / "verdicts.jsonl").read_text() == ""


def test_a_judge_that_does_not_answer_in_time_is_asked_again(tmp_path):
    late = threading.Event()

    def late_once(a, b, attempt):
        if a == "1" and attempt == 0:
            late.wait(60)
        return longer(a, b, attempt)

    with served(late_once) as server:
        pairs = [Pair("Thrice", "1", "123")]
        assert judge(pairs, config(server, timeout_s=1), tmp_path / "verdicts.jsonl").win_rate == 1
        late.set()
    assert server.questions.count(("1", "123")) >= 2


def test_an_answer_that_is_no_chat_completion_is_an_error_before_the_start(tmp_path):
    with (
        served(longer, probe=[]) as server,
        pytest.raises(ConfigError, match=r"answers no chat completion: .*choices=\[\]"),
    ):
        judge(PAIRS, config(server), tmp_path / "verdicts.jsonl")


def test_an_endpoint_that_cannot_be_used_is_an_error_before_the_start(tmp_path, monkeypatch):
    path = tmp_path / "verdicts.jsonl"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(ConfigError, match="cannot be reached"):
        judge(PAIRS, JudgeConfig(nobody, "judge"), path)
    with pytest.raises(ConfigError, match="cannot be reached"):
        judge(PAIRS, JudgeConfig("localhost/v1", "judge"), path)
    with served(longer, key="secret") as server:
        with pytest.raises(ConfigError, match=r"404.*with its /v1"):
            judge(PAIRS, JudgeConfig(server.url.removesuffix("/v1"), "judge"), path)
        with pytest.raises(ConfigError, match=r"401.*wrong key"):
            judge(PAIRS, config(server), path)
        monkeypatch.delenv("JUDGE_KEY", raising=False)
        with pytest.raises(ConfigError, match="JUDGE_KEY: no such environment variable"):
            judge(PAIRS, config(server, key_env="JUDGE_KEY"), path)
        monkeypatch.setenv("JUDGE_KEY", "secret")
        assert judge(PAIRS, config(server, key_env="JUDGE_KEY"), path).win_rate == 0.75
    path.write_text('{"something": "else"}\n')
    with pytest.raises(ConfigError, match="line 1, is no verdict"):
        judge(PAIRS, JudgeConfig(nobody, "judge"), path)
