"""From a corpus to blocks of N tokens: documents are tokenised, packed into blocks and split into train and held-out.

    documents (Ray Data, streaming) ─► tokenise + pack + shuffle a shard of documents ─► Parquet shards ─► manifest

The name of the folder of a prepared corpus is a hash of everything that it was made from, so the same inputs find it again.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from kforcing.loading import load_tokenizer
from pipelines.config.fingerprint import fingerprint
from pipelines.config.schema import DataConfig, TokenizerConfig
from pipelines.config.section import ConfigError
from pipelines.config.stages import CorpusSpec
from pipelines.data.corpus import SELF, documents, is_heldout, source_digest
from pipelines.data.rows import token_rows
from pipelines.data.token_store import MANIFEST, write_manifest, write_shard
from pipelines.files import atomic_folder
from pipelines.log import log

_SAY_EVERY_S = 2.0
END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class Prepared:
    """A finished corpus on disk."""

    folder: Path

    @property
    def tokenizer(self) -> Path:
        """Folder of the tokenizer."""
        return self.folder / "tokenizer"

    def split(self, name: str) -> Path:
        """Folder of the `train` or `heldout` store."""
        return self.folder / name

    @property
    def id(self) -> str:
        """The fingerprint of its inputs."""
        return self.folder.name

    def facts(self) -> dict[str, Any]:
        """Rows, tokens, documents and tokens/s of both splits."""
        keep = ("rows", "tokens", "documents", "seconds")
        records = {s: json.loads((self.split(s) / MANIFEST).read_text()) for s in ("train", "heldout")}
        return {name: {key: record[key] for key in keep} for name, record in records.items()}


def eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that ends a document: EOS, or the separator of BERT-style vocabularies. Raises ConfigError without either."""
    for token_id in (tokenizer.eos_token_id, tokenizer.sep_token_id):
        if token_id is not None:
            return token_id
    raise ConfigError(f"tokenizer {tokenizer.name_or_path} has neither an EOS nor a separator token; add one to it")


def _tokenizer_digest(spec: CorpusSpec) -> Any:
    path = spec.given_tokenizer
    if path is None:
        return {"vocab": spec.tokenizer.vocab_size, "sample": spec.tokenizer.sample_chars}
    files = sorted(Path(path).glob("tokenizer*")) + sorted(Path(path).glob("vocab*"))
    contents = [hashlib.blake2b(f.read_bytes(), digest_size=16).hexdigest() for f in files if f.is_file()]
    return {"path": None if contents else path, "gguf": spec.gguf_file, "files": contents}


def prepare(spec: CorpusSpec) -> Prepared:
    """Make the token blocks of a run, unless they exist already."""
    spec, source = _with_source(spec)
    name = fingerprint(*source, _tokenizer_digest(spec))
    prepared = Prepared(spec.cache / name)
    if (prepared.split("heldout") / MANIFEST).is_file():
        log.info(f"corpus  {prepared.folder} is up to date")
        return prepared
    prepared.folder.mkdir(parents=True, exist_ok=True)
    with FileLock(prepared.folder / ".lock"):
        _make(spec, prepared)
    return prepared


def _with_source(spec: CorpusSpec) -> tuple[CorpusSpec, tuple[Any, Any]]:
    """The spec with a source that exists, and what names it: text that the AR model writes itself is written here."""
    if spec.data.source != SELF:
        return spec, (spec.data, source_digest(spec.data))
    from pipelines.data.self_text import TextJob, write_self_text

    assert spec.given_tokenizer, "validated"
    job = TextJob(spec.given_tokenizer, spec.gguf_file, spec.seed, spec.self_text, spec.cache)
    folder = write_self_text(job)
    data = dataclasses.replace(spec.data, source=f"{folder}/*.parquet", text_column="text", id_column="number")
    return dataclasses.replace(spec, data=data), (spec.data, folder.name)


def _make(spec: CorpusSpec, prepared: Prepared) -> None:
    """Make those of the tokenizer and the two splits that do not exist yet."""
    ray.data.DataContext.get_current().execution_options.preserve_order = True  # the same shards every time
    documents(spec.data)  # a source that cannot be read is an error here, not in a remote task
    if not prepared.tokenizer.is_dir():
        with atomic_folder(prepared.tokenizer) as partial:
            if spec.given_tokenizer:
                load_tokenizer(spec.given_tokenizer, spec.gguf_file).save_pretrained(partial)
            else:
                log.info(f"corpus  training a byte-level BPE of {spec.tokenizer.vocab_size} tokens")
                ray.get(_train_tokenizer.remote(spec.data, spec.tokenizer, str(partial)))
    for split in ("train", "heldout"):
        _write_split(spec.data, prepared, split)


@ray.remote(num_cpus=0)
def _train_tokenizer(data: DataConfig, config: TokenizerConfig, folder: str) -> None:
    ray.data.DataContext.get_current().execution_options.preserve_order = True

    def texts() -> Iterator[str]:
        left = config.sample_chars
        for batch in documents(data).iter_batches(batch_size=16, batch_format="pyarrow"):
            train = ~is_heldout(batch["doc"].to_numpy(), data.heldout_fraction)
            for text in batch["text"].filter(pa.array(train)).to_pylist():
                yield text[:left]
                left -= len(text)
                if left <= 0:
                    return

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT)
    fast.save_pretrained(folder)


@functools.lru_cache(maxsize=1)
def _worker_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    return load_tokenizer(folder)


def pack(ids: list[list[int]], docs: np.ndarray, block: int, eos: int) -> tuple[np.ndarray, np.ndarray]:
    """Concatenate documents, each followed by EOS, and cut blocks of `block` tokens. The short tail is dropped.

    Returns:
        (n, block) int32 blocks, and for each block the id of the document to which its first token belongs.
    """
    stream = np.concatenate([np.append(np.asarray(x, np.int32), np.int32(eos)) for x in ids]).astype(np.int32)
    ends = np.cumsum([len(x) + 1 for x in ids])
    n = len(stream) // block
    owners = np.searchsorted(ends, np.arange(n) * block, side="right")
    return stream[: n * block].reshape(n, block), docs[owners]


def sequence_ids(blocks: np.ndarray) -> np.ndarray:
    """63-bit hash of the content of each block. It names the sequence in its noise and orders the blocks of a shard."""
    digests = [hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in blocks]
    return (np.frombuffer(b"".join(digests), "<u8") >> np.uint64(1)).astype(np.int64)


def _pack_shard(table: pa.Table, data: DataConfig, prepared: Prepared, split: str) -> pa.Table:
    docs = table["doc"].to_numpy()
    chosen = is_heldout(docs, data.heldout_fraction) == (split == "heldout")
    texts = table["text"].filter(pa.array(chosen)).to_pylist()
    tokenizer = _worker_tokenizer(str(prepared.tokenizer))
    ids = (
        tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        if texts
        else []
    )
    entry: dict[str, Any] = {"file": "", "rows": 0}
    if sum(map(len, ids)) + len(ids) >= data.block:
        blocks, owners = pack(ids, docs[chosen], data.block, eos_id(tokenizer))
        seq = sequence_ids(blocks)
        order = np.argsort(seq, kind="stable")
        name = hashlib.blake2b(seq[order].tobytes(), digest_size=8).hexdigest()
        entry = write_shard(prepared.split(split), name, token_rows(seq[order], owners[order], blocks[order]))
    return pa.Table.from_pylist([{**entry, "documents": len(texts), "tokens": entry["rows"] * data.block}])


def _write_split(data: DataConfig, prepared: Prepared, split: str) -> None:
    folder = prepared.split(split)
    if (folder / MANIFEST).is_file():
        return
    folder.mkdir(exist_ok=True)
    started = said = time.monotonic()
    shards = (
        documents(data)
        .repartition(target_num_rows_per_block=data.docs_per_shard)
        .map_batches(
            _pack_shard,
            fn_kwargs={"data": data, "prepared": prepared, "split": split},
            batch_format="pyarrow",
            batch_size=data.docs_per_shard,
        )
    )
    entries: list[dict[str, Any]] = []
    count = tokens = 0
    for row in shards.iter_rows():
        count, tokens = count + row.pop("documents"), tokens + row.pop("tokens")
        if row["rows"]:
            entries.append(row)
        if time.monotonic() > said + _SAY_EVERY_S:
            said = time.monotonic()
            log.info(
                f"corpus  {split}  {count} documents  {tokens:,} tokens  {tokens / (said - started):,.0f} tokens/s"
            )
    if not entries:
        raise ConfigError(
            f"the {split} split of {data.source} has {count} documents and not one block of {data.block} tokens; use a "
            "larger corpus, a smaller data.block, or another data.heldout_fraction"
        )
    seconds = time.monotonic() - started
    log.info(f"corpus  {split}  {count} documents  {tokens:,} tokens  {tokens / seconds:,.0f} tokens/s, done")
    write_manifest(folder, entries, tokens=tokens, documents=count, seconds=round(seconds, 2))
