"""A served tiny model for tests: its directory, the endpoint under a real HTTP server without Ray, and requests to it."""

import asyncio
import contextlib
import json
import threading
from collections import Counter

import uvicorn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kforcing.reference import decode
from serve.api import create_app
from serve.service import Service
from serve.settings import Settings
from tests.models import VOCAB, make_backbone, make_sequential
from tests.waiting import wait_until

LETTERS = "abcdefghijklmnopqrst u|"  # token i is letter i; the last is end-of-text
EOS = VOCAB - 1


CHAT = "{% for m in messages %}{{ m.role[0] }} {{ m.content }} {% endfor %}"


def save_model(folder, student=None, chat=False, eos=True, template=CHAT):
    """A student with a tokenizer of letters; returns the directory."""
    assert len(LETTERS) == VOCAB
    student = student or make_sequential(make_backbone())
    # A config of Llama ends texts at id 2 by default, which is a letter here.
    student.generation_config.eos_token_id = EOS if eos is True else eos or None
    student.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(LETTERS)}, unk_token="u"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="|" if eos else None)
    if chat:
        fast.chat_template = template
    fast.save_pretrained(folder)
    return folder


def text_of(ids):
    return "".join(LETTERS[i] for i in ids if i != EOS)


def ids_of(text):
    return [LETTERS.index(c) for c in text]


class HeldSteps:
    """Holds an engine before each of its steps until the test releases it, so that a test decides what happens first."""

    def __init__(self, engine):
        self.done = 0
        self._permits = threading.Semaphore(0)
        self._step = engine.step
        engine.step = self._held_step

    def _held_step(self):
        assert self._permits.acquire(timeout=60), "the test released no step for 60 s"
        outputs = self._step()
        self.done += 1
        return outputs

    def release(self, steps):
        self._permits.release(steps)


@contextlib.contextmanager
def endpoint(folder, api_key=None, max_body=2**20, origins=("*",), **settings):
    """(base URL, service) of a served directory, by default in fixed mode, whose steps all have k tokens."""
    service = Service("test")
    config = Settings(model=str(folder), name="tiny", **{"acceptance": "fixed", **settings})
    asyncio.run(service.configure(config))

    async def scrape():
        return service.metrics.text()

    app = create_app(service, [api_key] if api_key else [], max_body, scrape, origins)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started, "the HTTP server did not start")
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}", service
    finally:
        server.should_exit = True
        thread.join(timeout=30)
        for model in service.models.values():
            model.async_engine.close()
        service.thread.close()


def complete(http, **body):
    """The answer to a completion request, which must succeed."""
    answer = http.post("/v1/completions", json={"model": "tiny", "prompt": "abc", "seed": 1, "max_tokens": 12, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def events(http, path="/v1/completions", **body):
    """Parsed server-sent events of a stream; the last one must be [DONE]."""
    base = {"model": "tiny", "seed": 1, "max_tokens": 12, "stream": True}
    base |= {"prompt": "abc"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "abc"}]}
    with http.stream("POST", path, json=base | body) as answer:
        assert answer.status_code == 200
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def metrics(http):
    """{name{labels}: value} of /metrics; a sample that has not been exported yet counts as 0."""
    lines = [line for line in http.get("/metrics").text.splitlines() if not line.startswith("#")]
    return Counter({name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)})


def expected(student, prompt="abc", n=12, seed=1, k=4, stop=frozenset([EOS])):
    """The ids that the naive loop gives."""
    return decode(student, ids_of(prompt), n, seed=seed, k=k, stop_ids=stop)


def without_eos(student, n):
    """A seed whose first n tokens are not end-of-text, and their text."""
    rows = ((seed, expected(student, n=n, stop=frozenset(), seed=seed)) for seed in range(100))
    return next((seed, text_of(row)) for seed, row in rows if EOS not in row)
