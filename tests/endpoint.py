"""A served tiny model for tests: its directory, and the endpoint under a real HTTP server without Ray."""

import asyncio
import contextlib
import threading
import time

import uvicorn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from serve.api import create_app
from serve.service import Service
from serve.settings import Settings
from tests.conftest import VOCAB, make_backbone, make_sequential

LETTERS = "abcdefghijklmnopqrst u|"  # token i is letter i; the last is end-of-text
EOS = VOCAB - 1


def save_model(folder, student=None, chat=False, eos=True):
    """A student with a tokenizer of letters; returns the directory."""
    assert len(LETTERS) == VOCAB
    student = student or make_sequential(make_backbone())
    student.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(LETTERS)}, unk_token="u"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="|" if eos else None)
    if chat:
        fast.chat_template = "{% for m in messages %}{{ m.role[0] }} {{ m.content }} {% endfor %}"
    fast.save_pretrained(folder)
    return folder


def text_of(ids):
    return "".join(LETTERS[i] for i in ids if i != EOS)


def ids_of(text):
    return [LETTERS.index(c) for c in text]


@contextlib.contextmanager
def endpoint(folder, api_key=None, max_body=2**20, **settings):
    """(base URL, service) of a served directory."""
    service = Service("test")
    config = Settings(model=str(folder), name="tiny", **settings)
    asyncio.run(service.configure(config))
    service._swap = asyncio.Lock()

    async def scrape():
        return service.metrics.text()

    server = uvicorn.Server(
        uvicorn.Config(create_app(service, api_key, max_body, scrape), port=0, log_level="warning", lifespan="off")
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}", service
    finally:
        server.should_exit = True
        thread.join()
        for model in service.models.values():
            model.loop.close()
        service.worker.close()
