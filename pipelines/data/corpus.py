"""A corpus as a Ray dataset with columns `doc` and `text`, and what names it.

    data.source ─► listing.py: which files ─► reading.py: a file's documents ─► Ray Data, a task a file

Every file is read in pieces of a few MB. Only a downloaded `hf:` corpus passes through the object store.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from pyarrow import fs

from pipelines.config.schema import DataConfig
from pipelines.config.section import ConfigError
from pipelines.data.listing import Listing, cut, is_remote, list_files
from pipelines.data.reading import as_documents, check_columns, check_file, read_documents
from pipelines.files import content_digest, hash_file
from pipelines.log import without_passwords

if TYPE_CHECKING:
    import ray.data

_ARROW_ROWS = 10_000
_MOST_READ_TASKS = 256
_RAY_LOGGER = "ray.data._internal.execution.streaming_executor_state"
"""It prints the traceback of a task that failed."""
_HASH_FROM = 1 << 28
"""Bytes of a file whose hash is kept; smaller files are hashed as earlier releases did, so that corpora keep their names."""


def check_source(config: DataConfig, listing: Listing | None = None) -> Listing:
    """Check every file's columns and beginning; returns the files. Raises ConfigError, which names the file.

    Args:
        listing: of the source, where it has been made already; so in the functions below.
    """
    listing = listing or list_files(config.source)

    def check(file: fs.FileInfo) -> bool:
        return check_file(listing.system, file.path, config)

    with ThreadPoolExecutor(16) as pool:
        if not any(list(pool.map(check, listing.files))):
            shown = without_passwords(config.source)
            raise ConfigError(f"data.source={shown} holds no documents; there is nothing to train on")
    return listing


def source_digest(config: DataConfig, listing: Listing | None = None) -> str:
    """A hash of the contents of local files, of paths, sizes and times of remote ones, or of the name of a hub corpus."""
    digest = hashlib.blake2b(digest_size=16)
    if config.source.startswith("hf:"):
        digest.update(repr((config.source, config.hf_config, config.hf_split)).encode())
        inside = sorted(file for file in Path(config.source.removeprefix("hf:")).rglob("*") if file.is_file())
        digest.update("".join(map(content_digest, inside)).encode())
        return digest.hexdigest()
    listing = listing or list_files(config.source)
    if is_remote(config.source):
        digest.update(repr([(file.path, file.size, file.mtime_ns) for file in listing.files]).encode())
        return digest.hexdigest()
    for file in listing.files:
        if file.size > _HASH_FROM:
            digest.update(content_digest(Path(file.path)).encode())
        else:
            hash_file(digest, Path(file.path))
    return digest.hexdigest()


def documents(config: DataConfig, listing: Listing | None = None) -> ray.data.Dataset:
    """The corpus as a streaming Ray dataset with columns `doc` (int64 id hash) and `text` (null where a row has none).

    Raises ConfigError. What goes wrong while the dataset is consumed is a ConfigError inside `plain_errors`.
    """
    import ray.data

    if config.source.startswith("hf:"):
        dataset = _hugging_face(config).map_batches(
            _rename, fn_kwargs={"config": config}, batch_format="pyarrow", batch_size=None
        )
    else:
        listing = listing or list_files(config.source)
        paths = [{"path": file.path} for file in listing.files]
        dataset = ray.data.from_items(paths, override_num_blocks=min(len(paths), _MOST_READ_TASKS)).map_batches(
            _read, fn_kwargs={"system": listing.system, "config": config}, batch_size=None
        )
    return dataset.limit(config.max_docs) if config.max_docs is not None else dataset


def _read(files: dict[str, np.ndarray], system: fs.FileSystem, config: DataConfig) -> Iterator[pa.Table]:
    for path in files["path"]:
        yield from read_documents(system, path, config)


def _rename(table: pa.Table, config: DataConfig) -> Iterator[pa.Table]:
    yield from as_documents(table, f"{config.source} (a piece of it)", config)


@contextmanager
def plain_errors() -> Iterator[None]:
    """A ConfigError of a remote task arrives as itself: one line, and no traceback from Ray or in Ray's log on the screen."""
    import ray.exceptions

    logger = logging.getLogger(_RAY_LOGGER)
    logger.addFilter(_is_no_config_error)
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        cause: BaseException | None = error
        while isinstance(cause, ray.exceptions.RayTaskError):
            cause = cause.cause
        if not isinstance(cause, ConfigError):
            raise
        raise ConfigError(cause) from None
    finally:
        logger.removeFilter(_is_no_config_error)


def _is_no_config_error(record: logging.LogRecord) -> bool:
    return not (record.exc_info and isinstance(record.exc_info[1], ConfigError))


def _hugging_face(config: DataConfig) -> ray.data.Dataset:
    import datasets
    import ray.data

    name = config.source.removeprefix("hf:")
    local = Path(name).is_dir()
    try:
        if local and Path(name, "dataset_info.json").is_file():
            loaded = datasets.load_from_disk(name)
        else:
            streaming = config.hf_streaming and not local
            loaded = datasets.load_dataset(name, config.hf_config, split=config.hf_split, streaming=streaming)
    except Exception as error:
        raise ConfigError(
            f"data.source={config.source}: `datasets` cannot load it ({type(error).__name__}: {cut(error)}). Check the "
            "name, data.hf_config and data.hf_split, and that this machine reaches the hub or has the corpus in its cache"
        ) from error
    if loaded.features:
        check_columns(loaded.features.arrow_schema, config.source, config)
    if isinstance(loaded, datasets.IterableDataset):
        return ray.data.from_huggingface(loaded)
    # Ray would ask the hub for the Parquet files of a downloaded dataset, whose Arrow files are on this machine already.
    table = loaded.with_format("arrow")
    return ray.data.from_arrow([table[i : i + _ARROW_ROWS] for i in range(0, len(table), _ARROW_ROWS)])


def is_heldout(docs: np.ndarray, fraction: float) -> np.ndarray:
    """Whether each document is held out, which depends on the hash of its id alone: (D,) int64 → (D,) bool."""
    return (docs >> 11) < fraction * 2**52
