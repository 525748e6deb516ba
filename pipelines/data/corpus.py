"""Reading a corpus: Parquet, JSON lines, text or a name of `datasets` becomes a Ray dataset with columns `doc` and `text`.

Each line of a text file is a document, as in `datasets`. Parquet, JSON lines and streamed `hf:` corpora are read in pieces.
Ray reads a text file whole, and a downloaded `hf:` corpus passes through the object store.
"""

from __future__ import annotations

import glob
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.config.schema import DataConfig
from pipelines.config.section import ConfigError

if TYPE_CHECKING:
    import ray.data

_CORPORA = Path(__file__).parent / "corpora"
BUILTIN = {"sotu": _CORPORA / "sotu.parquet", "smollm2-chat": _CORPORA / "smollm2-chat.parquet"}
SELF = "self"
"""The source of text that the AR model writes itself."""
_SUFFIXES = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".txt": "text"}
_ARROW_ROWS = 10_000
_HASH_WHOLE_FILES_UP_TO = 1 << 28


def local_files(source: str) -> list[str]:
    """Files behind a local source, sorted. Raises ConfigError when there is none."""
    path = Path(BUILTIN.get(source, source)).expanduser()
    found = sorted(map(str, path.rglob("*"))) if path.is_dir() else sorted(glob.glob(str(path)))
    files = [f for f in found if Path(f).is_file() and Path(f).suffix in _SUFFIXES]
    if not files:
        raise ConfigError(
            f"data.source={source}: no .parquet, .jsonl, .json or .txt file there. Give an existing file, folder or glob, "
            f"`hf:NAME` for a `datasets` corpus, or one of the built-in corpora: {', '.join(BUILTIN)}"
        )
    if len({_SUFFIXES[Path(f).suffix] for f in files}) > 1:
        raise ConfigError(f"data.source={source} mixes file types; give a glob that selects one, like {path}/*.parquet")
    return files


def is_remote(source: str) -> bool:
    """Whether the source is read over a network. Such a source is checked on the cluster only."""
    return source.startswith("hf:") or "://" in source or source == SELF


def check_source(config: DataConfig) -> None:
    """Check that the first file of a local source exists, has the columns and holds documents. Raises ConfigError."""
    if is_remote(config.source):
        return
    files = local_files(config.source)
    first = next((f for f in files if Path(f).stat().st_size), files[0])
    try:
        columns, empty = _look_into(first, config)
    except (UnicodeDecodeError, OSError, pa.ArrowInvalid) as error:
        raise ConfigError(
            f"data.source={config.source}: {first} cannot be read ({type(error).__name__}: {error})"
        ) from None
    if empty:
        raise ConfigError(f"data.source={config.source}: {first} holds no documents; there is nothing to train on")
    for name, column in (("text_column", config.text_column), ("id_column", config.id_column)):
        if column is not None and column not in columns:
            raise ConfigError(f"data.{name}={column} is not in {first}; its columns are {', '.join(columns)}")


def _look_into(file: str, config: DataConfig) -> tuple[list[str], bool]:
    """Columns of a local file, and whether it is empty."""
    kind = _SUFFIXES[Path(file).suffix]
    if kind == "parquet":
        parquet = pq.ParquetFile(file)
        return parquet.schema_arrow.names, parquet.metadata.num_rows == 0
    with open(file, encoding="utf8") as lines:
        line = next((x for x in lines if x.strip()), "")
    if kind == "text":
        if config.id_column:
            raise ConfigError(f"data.id_column={config.id_column}: text files have no columns; leave it out")
        return [config.text_column], not line
    try:
        record = json.loads(line) if line else {config.text_column: "", config.id_column or "": ""}
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise ConfigError(f"{file} must hold one JSON object on each line; its first line is {line[:80]!r}")
    return list(record), not line


def source_digest(config: DataConfig) -> str:
    """A hash of the contents of small local files, and of name, size and time of other files."""
    digest = hashlib.blake2b(digest_size=16)
    if config.source.startswith("hf:"):
        digest.update(repr((config.source, config.hf_config, config.hf_split)).encode())
    elif "://" in config.source:
        from pyarrow import fs

        system, path = fs.FileSystem.from_uri(config.source)
        info = system.get_file_info(path)
        infos = (
            system.get_file_info(fs.FileSelector(path, recursive=True))
            if info.type == fs.FileType.Directory
            else [info]
        )
        digest.update(repr(sorted((i.path, i.size, i.mtime_ns) for i in infos)).encode())
    else:
        for file in map(Path, local_files(config.source)):
            stat = file.stat()
            whole = stat.st_size <= _HASH_WHOLE_FILES_UP_TO
            if not whole:
                digest.update(repr((str(file), stat.st_size, stat.st_mtime_ns)).encode())
                continue
            with open(file, "rb") as stream:
                while piece := stream.read(1 << 20):
                    digest.update(piece)
    return digest.hexdigest()


def documents(config: DataConfig) -> ray.data.Dataset:
    """The corpus as a streaming Ray dataset with columns `doc` (int64 id hash) and `text`."""
    import ray.data

    columns = [config.text_column] + ([config.id_column] if config.id_column else [])
    if config.source.startswith("hf:"):
        dataset = _hugging_face(config)
    else:
        paths = [config.source] if "://" in config.source else local_files(config.source)
        kind = _SUFFIXES.get(Path(paths[0]).suffix, "parquet")
        if kind == "parquet":
            dataset = ray.data.read_parquet(paths, columns=columns)
        elif kind == "json":
            dataset = ray.data.read_json(paths, lines=True).select_columns(columns)
        else:
            dataset = ray.data.read_text(paths).rename_columns({"text": config.text_column})
    if config.max_docs is not None:
        dataset = dataset.limit(config.max_docs)

    def name_documents(table: pa.Table) -> pa.Table:
        table = table.filter(pc.is_valid(table[config.text_column]))  # a row without a text is no document
        texts = table[config.text_column]
        names = table[config.id_column] if config.id_column else texts
        ids = [document_id(str(name)) for name in names.to_pylist()]
        return pa.table({"doc": pa.array(ids, pa.int64()), "text": texts.cast(pa.string())})

    return dataset.map_batches(name_documents, batch_format="pyarrow", batch_size=None)


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
            f"data.source={config.source}: `datasets` cannot load it ({type(error).__name__}: {error}). Check the name, "
            "data.hf_config and data.hf_split, and that this machine reaches the hub or has the corpus in its cache"
        ) from error
    if loaded.column_names and config.text_column not in loaded.column_names:
        raise ConfigError(
            f"data.text_column={config.text_column} is not in {config.source}; its columns are "
            f"{', '.join(loaded.column_names)}"
        )
    if isinstance(loaded, datasets.IterableDataset):
        return ray.data.from_huggingface(loaded)
    # Ray would ask the hub for the Parquet files of a downloaded dataset, whose Arrow files are on this machine already.
    table = loaded.with_format("arrow")
    return ray.data.from_arrow([table[i : i + _ARROW_ROWS] for i in range(0, len(table), _ARROW_ROWS)])


def document_id(name: str) -> int:
    """63-bit hash of a document's id."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") >> 1


def is_heldout(docs: np.ndarray, fraction: float) -> np.ndarray:
    """Whether each document is held out, which depends on the hash of its id alone: (D,) int64 → (D,) bool."""
    return (docs >> 11) < fraction * 2**52
