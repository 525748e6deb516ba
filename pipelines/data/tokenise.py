"""From a corpus to blocks of N tokens: documents are tokenised, packed into blocks and split into train and held-out.

    documents (Ray Data, streaming) ─► tokenise + pack + shuffle a shard of documents ─► Parquet shards ─► manifest

The name of the folder of a prepared corpus is a hash of everything that it was made from, so the same inputs find it again.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections import Counter
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

from kforcing.conventions import CONVENTIONS
from kforcing.loading import load_tokenizer, save_tokenizer
from kforcing.remote import address, fetch, is_uri, local, read_bytes, uri_of
from pipelines.config.fingerprint import fingerprint
from pipelines.config.schema import DataConfig, TokenizerConfig
from pipelines.config.section import ConfigError
from pipelines.config.stages import CorpusSpec
from pipelines.data.corpus import check_source, documents, is_heldout, plain_errors, source_digest
from pipelines.data.encoding import bounded_words, eos_id, special_spellings, token_ids
from pipelines.data.listing import CHAT, SELF, Listing, cut, is_remote, list_files
from pipelines.data.packing import PACKED, SplitWriter, pack, write_blocks
from pipelines.data.token_store import MANIFEST, is_complete
from pipelines.files import atomic_folder, content_digest
from pipelines.log import log, without_passwords
from pipelines.storage import held, remove

_SAY_EVERY_S = 2.0
END_OF_TEXT = "<|endoftext|>"
SPLITS = ("train", "heldout")
RULES = 2
"""Part of the name of every corpus; another number whenever the same inputs give other blocks."""
_TOKENIZER_FILES = (
    *("tokenizer*", "vocab*", "merges*", "*.model", "*.tiktoken", "added_tokens.json", "special_tokens_map.json"),
    *("chat_template*", "additional_chat_templates/*"),
)


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
        records = {s: json.loads(read_bytes(self.split(s) / MANIFEST)) for s in SPLITS}
        return {name: {key: record[key] for key in keep} for name, record in records.items()}


def prepare(spec: CorpusSpec) -> Prepared:
    """Make the token blocks of a run, unless they exist already."""
    spec = _with_source(spec)
    listing = listing_of(spec)
    places = [Prepared(spec.cache / name) for name in _names(spec, listing)]
    for prepared in places:
        _fetch(prepared)
        if _is_whole(prepared):
            log.info(f"corpus  {address(prepared.folder)} is up to date")
            if prepared != places[-1]:
                log.info(
                    "corpus  an earlier release made it, with blank documents and special tokens as they are in the text"
                )
            return prepared
    prepared = places[-1]
    prepared.folder.mkdir(parents=True, exist_ok=True)
    with FileLock(prepared.folder / ".lock"), held(prepared.folder, "", wait=True), plain_errors():
        fetch(prepared.folder)
        if not (uri_of(prepared.folder) and _is_whole(prepared)):  # another run may have made it while this one waited
            _make(spec, prepared, listing)
    return prepared


def _fetch(prepared: Prepared) -> None:
    """Bring the copy of a corpus in object storage up to date, unless another run on this machine is making it."""
    if uri_of(prepared.folder):
        prepared.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(prepared.folder / ".lock"):
            fetch(prepared.folder)


def _is_whole(prepared: Prepared) -> bool:
    """Whether a corpus is complete and on disk as it was made."""
    if not (prepared.split(SPLITS[-1]) / MANIFEST).is_file():
        return False
    if problem := _problem_of_tokenizer(prepared):
        log.warning(f"{prepared.tokenizer} is cut or changed and is made again ({problem})")
        return False
    return all(is_complete(prepared.split(name)) for name in SPLITS)


def _problem_of_tokenizer(prepared: Prepared) -> str | None:
    """Why a tokenizer cannot be loaded; in object storage also that its last file was not uploaded."""
    if uri_of(prepared.folder) and not (prepared.tokenizer / CONVENTIONS).is_file():
        return f"there is no {CONVENTIONS}"
    try:
        load_tokenizer(prepared.tokenizer)
    except Exception as error:  # files that are cut raise many kinds
        return cut(" ".join(str(error).split()))
    return None


def listing_of(spec: CorpusSpec) -> Listing | None:
    """The files of the source; None for a corpus of the hub, whose files `datasets` knows."""
    return None if spec.data.source.startswith("hf:") else list_files(spec.data.source)


def _with_source(spec: CorpusSpec) -> CorpusSpec:
    """The spec with a source that exists: text that the AR model writes itself is written here."""
    if spec.data.source != SELF:
        return spec
    from pipelines.data.self_text import TextJob, write_self_text

    assert spec.given_tokenizer, "validated"
    job = TextJob(spec.given_tokenizer, spec.gguf_file, spec.seed, spec.self_text, address(spec.cache))
    folder = write_self_text(job)
    data = dataclasses.replace(
        spec.data,
        source=f"{address(folder)}/*.parquet",
        text_column="text",
        id_column="number",
        special_tokens=_special_tokens(spec.data),
    )
    return dataclasses.replace(spec, data=data)


def _names(spec: CorpusSpec, listing: Listing | None) -> list[str]:
    """Names under which the corpus may be found; the last one is for a new one.

    The contents of local files name a corpus, and not where they lie. Where an earlier release could not have read or
    tokenised them differently, its name comes first: its corpora are used as they are.
    """
    data, tokenizer = spec.data, _tokenizer_digest(spec)
    contents = _digest_of_own(spec) or source_digest(data, listing)
    kind = data.source if listing is None or is_remote(data.source) else listing.kind
    effective = dataclasses.replace(data, source=kind, special_tokens=_special_tokens(data))
    earlier = [fingerprint(data, contents, tokenizer)] if kind == "parquet" and not spec.given_tokenizer else []
    return [*earlier, fingerprint(effective, contents, tokenizer, RULES)]


def _digest_of_own(spec: CorpusSpec) -> Any:
    """What names a text in object storage that the AR model wrote: checksums, where other remote files have times."""
    folder = spec.data.source.removesuffix("/*.parquet")
    if not is_uri(folder) or not local(folder).is_relative_to(spec.cache):
        return None
    return [[shard["file"], shard["crc32"]] for shard in json.loads(read_bytes(f"{folder}/{MANIFEST}"))["shards"]]


def _tokenizer_digest(spec: CorpusSpec) -> Any:
    """What names the tokenizer: all files that it is made from, or how it is trained."""
    path = spec.given_tokenizer
    if path is None:
        return {"vocab": spec.tokenizer.vocab_size, "sample": spec.tokenizer.sample_chars}
    if not Path(path).is_dir():
        return {"id": path}
    patterns = [*_TOKENIZER_FILES, *([spec.gguf_file] if spec.gguf_file else [])]
    files = sorted(file for pattern in patterns for file in Path(path).glob(pattern) if file.is_file())
    return {"files": [(file.name, content_digest(file)) for file in files]}


def _make(spec: CorpusSpec, prepared: Prepared, listing: Listing | None) -> None:
    """Make those of the tokenizer and the two splits that do not exist yet."""
    ray.data.DataContext.get_current().execution_options.preserve_order = True  # the same shards every time
    if listing is None:
        documents(spec.data)  # a hub corpus that cannot be read is an error here, not in a remote task
    else:
        log.info(f"corpus  {check_source(spec.data, listing)}")
    if prepared.tokenizer.is_dir() and _problem_of_tokenizer(prepared):
        remove(prepared.tokenizer)
    if not prepared.tokenizer.is_dir():
        if spec.given_tokenizer:
            with atomic_folder(prepared.tokenizer, CONVENTIONS) as partial:
                save_tokenizer(load_tokenizer(spec.given_tokenizer, spec.gguf_file), partial)
        else:
            log.info(f"corpus  training a byte-level BPE of {spec.tokenizer.vocab_size} tokens")
            ray.get(_train_tokenizer.remote(spec.data, spec.tokenizer, address(prepared.tokenizer)))
            fetch(prepared.tokenizer)
    _write_splits(spec.data, prepared, listing)


@ray.remote(num_cpus=0)
def _train_tokenizer(data: DataConfig, config: TokenizerConfig, folder: str) -> None:
    ray.data.DataContext.get_current().execution_options.preserve_order = True

    def texts() -> Iterator[str]:
        left = config.sample_chars
        for batch in documents(data).iter_batches(batch_size=16, batch_format="pyarrow"):
            train = ~is_heldout(batch["doc"].to_numpy(), data.heldout_fraction)
            for text in batch["text"].filter(pa.array(train)).drop_null().to_pylist():
                yield from bounded_words(text[:left])
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
    local(folder).parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(local(folder), CONVENTIONS) as partial:
        save_tokenizer(fast, partial)


@functools.lru_cache(maxsize=1)
def _worker_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    return load_tokenizer(fetch(folder))


def _pack_shard(table: pa.Table, data: DataConfig, folder: str) -> pa.Table:
    """Tokenise and pack some documents; one row for each split, as in `PACKED`."""
    prepared = Prepared(local(folder))
    tokenizer = _worker_tokenizer(address(prepared.tokenizer))
    eos, spellings = eos_id(tokenizer), special_spellings(tokenizer)
    texts, docs = np.array(table["text"].to_pylist(), object), table["doc"].to_numpy()
    heldout = is_heldout(docs, data.heldout_fraction)
    written = np.array([bool(text) and not text.isspace() for text in texts], bool)
    rows = []
    for split in SPLITS:
        chosen = heldout == (split == "heldout")
        kept = chosen & written
        found, null = texts[kept].tolist(), sum(text is None for text in texts[chosen])
        special = sum(len(spellings.findall(text)) for text in found)
        blank = int(chosen.sum()) - len(found) - null
        counts = {"documents": len(found), "null": null, "blank": blank, "special": special}
        tokens, owners = pack(token_ids(tokenizer, found, _special_tokens(data)), docs[kept], eos)
        rows.append({"split": split, **counts, **write_blocks(prepared.split(split), tokens, owners, data.block)})
    return pa.Table.from_pylist(rows, schema=PACKED)


def _write_splits(data: DataConfig, prepared: Prepared, listing: Listing | None) -> None:
    splits = {name: SplitWriter(prepared.split(name), data.block) for name in SPLITS}
    for split in splits.values():
        split.folder.mkdir(exist_ok=True)
    started = said = time.monotonic()
    packed = (
        documents(data, listing)
        .repartition(target_num_rows_per_block=data.docs_per_shard)
        .map_batches(
            _pack_shard,
            fn_kwargs={"data": data, "folder": address(prepared.folder)},
            batch_format="pyarrow",
            batch_size=data.docs_per_shard,
        )
    )
    for row in packed.iter_rows():
        splits[row["split"]].add(row)
        if time.monotonic() > said + _SAY_EVERY_S:
            said = time.monotonic()
            _say(splits, said - started)
    for split in splits.values():
        split.write_left()
    seconds = time.monotonic() - started
    _say(splits, seconds, ", done")
    _say_what_was_not_taken(data, splits)
    for name, split in splits.items():
        _check_blocks(name, split, data)
    for split in splits.values():  # the manifest of `heldout`, the last one, marks the corpus as complete
        split.finish(seconds)


def _special_tokens(data: DataConfig) -> bool:
    return data.source in (CHAT, SELF) if data.special_tokens is None else data.special_tokens


def _say(splits: dict[str, SplitWriter], seconds: float, end: str = "") -> None:
    for name, split in splits.items():
        rate = split.tokens / max(seconds, 1e-9)
        log.info(
            f"corpus  {name}  {split.counts['documents']} documents  {split.tokens:,} tokens  {rate:,.0f} tokens/s{end}"
        )


def _say_what_was_not_taken(data: DataConfig, splits: dict[str, SplitWriter]) -> None:
    counts = sum((split.counts for split in splits.values()), Counter[str]())
    if counts["null"] or counts["blank"]:
        log.info(f"corpus  left out: {counts['null']} rows without a text, {counts['blank']} blank documents")
    if counts["special"] and not _special_tokens(data):
        log.info(
            f"corpus  special tokens that documents spell out, {counts['special']} in all, are encoded as text; "
            "data.special_tokens=true encodes them as special tokens"
        )


def _check_blocks(name: str, split: SplitWriter, data: DataConfig) -> None:
    if not split.shards:
        counts, left = split.counts, sum(len(tokens) for tokens, _ in split.left)
        raise ConfigError(
            f"the {name} split of {without_passwords(data.source)} has {counts['documents']} documents "
            f"({counts['null']} rows without a text and {counts['blank']} blank ones left out) with {left} tokens, not one "
            f"block of {data.block} tokens; use a larger corpus, a smaller data.block, or another data.heldout_fraction"
        )
