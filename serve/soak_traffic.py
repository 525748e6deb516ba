"""The clients of `serve.soak`: requests of every kind, and a check of each answer."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

KINDS = ("whole", "whole", "stream", "stream", "leave a stream", "leave a whole answer", "bad")
BAD: list[tuple[str, dict[str, Any], int]] = [
    ("/v1/completions", {"prompt": "a", "max_tokens": -1}, 400),
    ("/v1/completions", {"prompt": [1] * 5000}, 400),
    ("/v1/completions", {"prompt": "a", "best_of": 3}, 400),
    ("/v1/chat/completions", {"messages": []}, 400),
    ("/v1/responses", {"input": "a", "previous_response_id": "resp_1"}, 400),
    ("/v1/completions", {"prompt": "a", "model": "none"}, 404),
    ("/v1/nothing", {}, 404),
]
"""Path, body and the status that it must have."""
KILLED = {500, 502, 503}
"""Statuses that requests of a killed replica may have."""
TIMEOUT_S = 120


@dataclass(frozen=True)
class Case:
    """A request whose texts are known once it was asked alone."""

    path: str
    body: dict[str, Any]


def cases(number: int, vocabulary: int, chat: bool) -> list[Case]:
    """Requests with prompts of token ids, some with a common beginning, and conversations where the models take them."""
    rng = random.Random(0)
    beginning = [rng.randrange(vocabulary) for _ in range(70)]
    found = []
    for seed in range(number):
        prompts = [[rng.randrange(vocabulary) for _ in range(rng.randint(1, 40))] for _ in range(rng.choice((1, 1, 3)))]
        if rng.random() < 0.4:
            prompts = [beginning + prompt for prompt in prompts]
        fields: dict[str, Any] = {
            "seed": seed,
            "max_tokens": rng.randint(1, 48),
            "temperature": rng.choice((0, 0.7, 1)),
        }
        fields |= {"acceptance": rng.choice(("exact", "fixed")), "ignore_eos": rng.random() < 0.5}
        if chat and rng.random() < 0.3:
            messages = [{"role": "user", "content": f"w{seed} w1 w2"}]
            found.append(Case("/v1/chat/completions", {"messages": messages, **fields}))
        else:
            found.append(Case("/v1/completions", {"prompt": prompts, "n": rng.choice((1, 1, 2)), **fields}))
    return found


class Endpoint:
    """Requests to an endpoint of this machine, each on its own connection."""

    def __init__(self, port: int):
        self.port = port

    def connect(self, timeout: float = TIMEOUT_S) -> http.client.HTTPConnection:
        """A new connection."""
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)

    def send(self, path: str, body: dict[str, Any], timeout: float = TIMEOUT_S) -> http.client.HTTPResponse:
        """The beginning of an answer. Raises OSError or HTTPException."""
        connection = self.connect(timeout)
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        return connection.getresponse()

    def get(self, path: str) -> tuple[int, str]:
        """Status and text."""
        connection = self.connect()
        connection.request("GET", path)
        answer = connection.getresponse()
        with answer:
            return answer.status, answer.read().decode()


class Failed(Exception):
    """An answer that is no success; its first argument is the status."""


def whole_texts(endpoint: Endpoint, case: Case) -> tuple[str, list[str]]:
    """The model that answered, and the text of each choice. Raises Failed, OSError or HTTPException."""
    with endpoint.send(case.path, case.body) as answer:
        data = answer.read()
        if answer.status != 200:
            raise Failed(answer.status, data[:300])
    body = json.loads(data)
    return body["model"], [_text(choice) or "" for choice in body["choices"]]


def streamed_texts(endpoint: Endpoint, case: Case, leave_after: int = 0) -> tuple[str, list[str]]:
    """The same of a stream, which the client leaves after so many events (0: never)."""
    parts: dict[int, str] = {}
    model = ""
    for i, event in enumerate(_events(endpoint, case)):
        if leave_after and i == leave_after:
            return "", []
        if "error" in event:
            raise Failed(503, event)
        model = event["model"]
        for choice in event["choices"]:
            parts[choice["index"]] = parts.get(choice["index"], "") + (_text(choice) or "")
    return model, [parts[i] for i in sorted(parts)]


def _events(endpoint: Endpoint, case: Case) -> Iterator[dict[str, Any]]:
    with endpoint.send(case.path, case.body | {"stream": True}) as answer:
        if answer.status != 200:
            raise Failed(answer.status, answer.read()[:300])
        ended = False
        for line in answer:
            if line.startswith(b"data: {"):
                yield json.loads(line.removeprefix(b"data: "))
            ended = ended or line.startswith(b"data: [DONE]")
        if not ended:
            raise Failed(502, "the stream has no end")


def _text(choice: dict[str, Any]) -> str | None:
    text = choice["text"] if "text" in choice else choice.get("message", choice.get("delta", {})).get("content")
    return None if text is None else str(text)


@dataclass
class Traffic:
    """Clients that send requests of all kinds until they are told to stop, and what they saw."""

    endpoint: Endpoint
    cases: list[Case]
    expected: dict[str, list[list[str]]]
    """Texts of each case asked alone, by model."""
    done: Counter[str] = field(default_factory=Counter)
    """Requests by kind."""
    answered_by: Counter[str] = field(default_factory=Counter)
    """Compared answers by model."""
    excused: Counter[str] = field(default_factory=Counter)
    """Errors in the time after a replica was killed."""
    problems: list[str] = field(default_factory=list)
    """Errors that nobody intended, and texts that differ."""
    excused_until: float = 0.0
    stopping: threading.Event = field(default_factory=threading.Event)

    def start(self, clients: int) -> list[threading.Thread]:
        """Start so many clients."""
        threads = [threading.Thread(target=self._client, args=(i,), daemon=True) for i in range(clients)]
        for thread in threads:
            thread.start()
        return threads

    def _client(self, number: int) -> None:
        rng = random.Random(number)
        while not self.stopping.is_set():
            kind, at, began = rng.choice(KINDS), rng.randrange(len(self.cases)), time.monotonic()
            try:
                self._one(kind, at, rng)
            except Exception as error:  # a client that ended silently would hide what comes later
                status = error.args[0] if isinstance(error, Failed) else None
                if began < self.excused_until and (status is None or status in KILLED):
                    self.excused[f"{type(error).__name__} {status or ''}".strip()] += 1
                else:
                    self.problems.append(f"{kind}: {type(error).__name__}: {error} ({self.cases[at]})")
            self.done[kind] += 1

    def _one(self, kind: str, at: int, rng: random.Random) -> None:
        case = self.cases[at]
        if kind == "bad":
            path, body, status = rng.choice(BAD)
            with self.endpoint.send(path, body) as answer:
                if answer.status != status:
                    raise Failed(answer.status, f"{path} {body} must have {status}")
                answer.read()
        elif kind == "leave a stream":
            streamed_texts(self.endpoint, case, leave_after=rng.randint(1, 4))
        elif kind == "leave a whole answer":
            with contextlib.suppress(TimeoutError):
                self.endpoint.send(case.path, case.body, timeout=rng.uniform(0.01, 0.3)).close()
        else:
            texts = (streamed_texts if kind == "stream" else whole_texts)(self.endpoint, case)
            self._compare(at, *texts)

    def _compare(self, at: int, model: str, texts: list[str]) -> None:
        self.answered_by[model] += 1
        if texts != self.expected[model][at]:
            self.problems.append(f"{model} answered {texts} and alone {self.expected[model][at]} to {self.cases[at]}")
