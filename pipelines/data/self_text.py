"""A corpus that the AR model writes itself: rollout actors generate documents, Ray Data streams them into Parquet shards.

    shard numbers ─► TextActor pool (the AR model in a decode engine) ─► a Parquet shard each ─► manifest

The corpus lies in a folder that is named by all it was made from, and is found again by it. A shard is written atomically
under a name that follows from its number, so an interrupted run continues with the missing ones.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray.data
import torch
from transformers import PreTrainedModel

from kforcing.backbone import load_ar
from kforcing.device import pick_device
from kforcing.distillation.self_text import ChatFrame, TextSettings, TextWriter
from kforcing.engine import Engine, EngineConfig
from kforcing.engine.config import context_limit
from kforcing.loading import eos_token_ids, load_tokenizer
from kforcing.modeling import PushForwardLM
from kforcing.remote import fetch, local, uri_of
from pipelines.config.fingerprint import fingerprint
from pipelines.config.schema import SelfTextConfig
from pipelines.config.section import node_selector
from pipelines.config.stages import model_digest
from pipelines.data.token_store import is_complete, read_shard, shard_entries, write_manifest, write_shard
from pipelines.log import log
from pipelines.storage import held

SCHEMA = pa.schema([("number", pa.int64()), ("temperature", pa.float32()), ("text", pa.string())])
"""A document: its number, the temperature of its answer, and its text with the tokens of the chat template."""

FACTS = b"self_text"
"""Key of a shard's facts in the metadata of its schema."""


@dataclass(frozen=True)
class TextJob:
    """All that determines a corpus, and where it is kept."""

    teacher: str
    """Folder or hub id of the AR model."""
    gguf_file: str | None
    seed: int
    config: SelfTextConfig
    cache: str
    """Folder or URI of such corpora."""

    @property
    def folder(self) -> Path:
        """Where the corpus is."""
        name = fingerprint("self", model_digest(self.teacher, self.gguf_file), self.seed, self.config)
        return local(self.cache) / f"self-{name}"

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.config.documents // self.config.docs_per_shard)

    def numbers(self, shard: int) -> range:
        """The documents of a shard."""
        first = shard * self.config.docs_per_shard
        return range(first, min(first + self.config.docs_per_shard, self.config.documents))


class TextActor:
    """Holds the AR model in a decode engine, and writes shards of documents."""

    def __init__(self, job: TextJob):
        config = job.config
        torch.set_num_threads(max(1, int(config.cpus_per_actor)))
        model = load_ar(job.teacher, job.gguf_file)
        self.job, self.tokenizer = job, load_tokenizer(job.teacher, job.gguf_file)
        stops = eos_token_ids(model.generation_config, self.tokenizer, model.config.vocab_size)
        slots = min(config.slots, config.docs_per_shard)
        frame = ChatFrame.of(self.tokenizer) or ChatFrame([0], [])
        length = len(frame.opening) + config.user_tokens + len(frame.middle) + config.answer_tokens
        length = min(length, context_limit(model.config) or length)
        writer: Any = student_of(model, config.student) if config.student else model
        acceptance = "exact" if config.student else "fixed"
        engine = EngineConfig(slots, length, coupling="gumbel", max_num_batched_tokens=512, acceptance=acceptance)
        self.engine = Engine(writer.to(pick_device()), engine)
        settings = TextSettings(job.seed, config.user_tokens, config.answer_tokens, repetition=config.repetition)
        self.writer = TextWriter(self.engine, self.tokenizer, stops, settings)

    def __call__(self, shards: pa.Table) -> pa.Table:
        """A column `id` of shard numbers → the manifest's entries of the shards, which are written here."""
        entries = [self._write(shard) for shard in shards["id"].to_pylist()]
        return pa.table({"entry": [json.dumps(entry) for entry in entries]})

    def _write(self, shard: int) -> dict[str, Any]:
        began, dropped, kept = time.monotonic(), Counter[str](), []
        for document in self.writer.write(self.job.numbers(shard)):
            if document.dropped:
                dropped[document.dropped] += 1
            else:
                kept.append(document)
        kept.sort(key=lambda document: document.number)
        texts = [self.tokenizer.decode(d.tokens, clean_up_tokenization_spaces=False) for d in kept]
        columns = [[d.number for d in kept], [d.temperature for d in kept], texts]
        tokens, seconds = sum(len(d.tokens) for d in kept), round(time.monotonic() - began, 2)
        facts = json.dumps({"tokens": tokens, "dropped": dropped, "seconds": seconds})
        table = pa.table(columns, schema=SCHEMA.with_metadata({FACTS: facts}))
        return _with_facts(self.job.folder, write_shard(self.job.folder, _name(shard), table))


def student_of(model: PreTrainedModel, place: str) -> PushForwardLM:
    """The student in a folder or at a URI, whose trunk must be this AR model. Raises ValueError where it is another one."""
    student = PushForwardLM.from_pretrained(fetch(place))
    own, given = student.backbone.state_dict(), model.state_dict()
    differ = [
        name
        for name, x in given.items()
        if name not in own or own[name].dtype != x.dtype or not torch.equal(own[name], x)
    ]
    if differ:
        raise ValueError(
            f"self_text.student={place} is not a student of this AR model: {len(differ)} of {len(given)} tensors differ, "
            f"{differ[0]} first; name a student of teacher.path, or leave it out"
        )
    return student


def _name(shard: int) -> str:
    return f"text-{shard:06d}"


def _with_facts(folder: Path, entry: dict[str, Any]) -> dict[str, Any]:
    """A shard's entry in the manifest, with the `tokens`, `dropped` and `seconds` that its file holds."""
    return {**entry, **read_shard(folder, entry["file"], lambda shard: json.loads(shard.schema_arrow.metadata[FACTS]))}


def write_self_text(job: TextJob) -> Path:
    """Write the corpus, unless it exists already; returns its folder."""
    folder = fetch(job.folder, whole=False)
    if is_complete(folder):
        log.info(f"text  {folder} is up to date")
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with held(folder, "", wait=True):
        fetch(folder, whole=False)
        if not (uri_of(folder) and is_complete(folder)):  # another run may have written it while this one waited
            _write_missing(job, folder)
    return folder


def _write_missing(job: TextJob, folder: Path) -> None:
    """Write the shards that an interrupted run has not written, and the manifest."""
    entries = [_with_facts(folder, entry) for entry in shard_entries(folder)]
    done = {entry["file"] for entry in entries}
    missing = [shard for shard in range(job.shards) if f"{_name(shard)}.parquet" not in done]
    log.info(f"text  the AR model writes {job.config.documents:,} documents, {len(missing)} of {job.shards} shards")
    began = time.monotonic()
    for entry in _written(job, missing) if missing else ():
        entries.append(entry)
        rate = entry["tokens"] / entry["seconds"] * job.config.actors
        left = (job.shards - len(entries)) * (time.monotonic() - began) / max(1, len(entries) - len(done))
        log.info(f"text  {len(entries)}/{job.shards} shards, {rate:,.0f} tokens/s, about {left / 60:.0f} min left")
    dropped = sum((Counter(entry.pop("dropped")) for entry in entries), Counter[str]())
    tokens = sum(entry["tokens"] for entry in entries)
    log.info(f"text  {tokens:,} tokens; dropped: " + (", ".join(f"{n} {why}" for why, n in dropped.items()) or "none"))
    write_manifest(folder, entries, tokens=tokens, dropped=dropped, seconds=round(time.monotonic() - began, 1))


def _written(job: TextJob, shards: list[int]) -> Iterator[dict[str, Any]]:
    """Entries of the shards as they are written."""
    config = job.config
    dataset = ray.data.from_items([{"id": shard} for shard in shards], override_num_blocks=len(shards)).map_batches(
        TextActor,
        fn_constructor_args=(job,),
        batch_format="pyarrow",
        batch_size=1,
        num_cpus=config.cpus_per_actor,
        num_gpus=config.gpus_per_actor or None,
        label_selector=node_selector(config.label),
        compute=ray.data.ActorPoolStrategy(size=config.actors, max_tasks_in_flight_per_actor=2),
    )
    for row in dataset.iter_rows():
        yield json.loads(row["entry"])
