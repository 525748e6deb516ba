"""One file of a corpus → its documents, exactly as they were written, or one line that says where the file is wrong.

    rule        Parquet                              JSON lines                               text
    document    a row                                an object, one a line                    a line, as in `datasets`
    text        a string column                      a string                                 the line without its line break
    no text     null                                 null, or the key is missing              –
    id          a string, or an integer in decimal   a string, or an integer in decimal       –

Files of text are UTF-8, with or without a byte order mark. Anything else is refused with the file and its row or line.
Rows without a text arrive with a null; whoever reads them counts them.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from pipelines.config.schema import DataConfig
from pipelines.config.section import ConfigError
from pipelines.data.listing import compression_of, cut, kind_of

DOCUMENTS = pa.schema([("doc", pa.int64()), ("text", pa.string())])
"""A document: the hash of its id, which is its text where the corpus has no ids, and its text or null."""
_TABLE_BYTES = 8 << 20
_TABLE_ROWS = 10_000
_CHECKED_RECORDS = 100
"""JSON lines among which each column must occur: one of them alone may have no text."""


def document_id(name: str) -> int:
    """63-bit hash of a document's id."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") >> 1


def read_documents(system: fs.FileSystem, path: str, config: DataConfig) -> Iterator[pa.Table]:
    """The documents of a file, in pieces of a few MB. Raises ConfigError with file and row."""
    rows = {"parquet": _parquet_rows, "json": _json_rows, "text": _text_rows}[kind_of(path) or ""]
    return _tables(rows(system, path, config), path, config)


def as_documents(table: pa.Table, where: str, config: DataConfig) -> Iterator[pa.Table]:
    """The documents of a table, which `where` names in errors."""
    return _tables(_table_rows(table, where, config), where, config)


def check_file(system: fs.FileSystem, path: str, config: DataConfig) -> bool:
    """Check the columns of a file, without reading it whole; whether it holds rows. Raises ConfigError with the file."""
    if kind_of(path) == "parquet":
        with _named(path):
            parquet = pq.ParquetFile(system.open_input_file(path))
        check_columns(parquet.schema_arrow, path, config)
        return parquet.metadata.num_rows > 0
    if kind_of(path) == "text":
        if config.id_column:
            raise ConfigError(f"data.id_column={config.id_column}: text files have no columns; leave it out")
        return any(line.strip() for _, line in _lines(system, path))
    records = [record for _, record in islice(_records(system, path), _CHECKED_RECORDS)]
    for name, column in _columns(config).items():
        if records and not any(column in record for record in records):
            raise _missing(name, column, path, list(records[0]))
    return bool(records)


def check_columns(schema: pa.Schema, where: str, config: DataConfig) -> None:
    """A table must have the columns of the config once, the text a string and the id a string or integer."""
    for name, column in _columns(config).items():
        count = schema.names.count(column)
        if count == 0:
            raise _missing(name, column, where, schema.names)
        if count > 1:
            raise ConfigError(f"{where} has {count} columns named {column}; leave one of them")
        kind = schema.field(column).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
        if not (text or pa.types.is_null(kind) or (name == "id_column" and pa.types.is_integer(kind))):
            wanted = "text" if name == "text_column" else "text or whole numbers"
            raise ConfigError(
                f"data.{name}={column}: in {where} that column has the type {cut(kind)}, not {wanted}; "
                "choose another column, or write it as strings"
            )


_Row = tuple[str, Any, Any]
"""Its place in the file, text and id, as they are in the file."""


def _parquet_rows(system: fs.FileSystem, path: str, config: DataConfig) -> Iterator[_Row]:
    with _named(path):
        parquet = pq.ParquetFile(system.open_input_file(path))
    check_columns(parquet.schema_arrow, path, config)
    meta = parquet.metadata
    size = sum(meta.row_group(i).total_byte_size for i in range(meta.num_row_groups))
    rows = max(1, min(_TABLE_ROWS, meta.num_rows * _TABLE_BYTES // max(size, 1)))
    batches = parquet.iter_batches(rows, columns=list(_columns(config).values()))
    row = 0
    while True:
        with _named(path, f", from row {row} on,"):
            batch = next(batches, None)
        if batch is None:
            return
        yield from _table_rows(pa.Table.from_batches([batch]), path, config, row)
        row += len(batch)


def _table_rows(table: pa.Table, where: str, config: DataConfig, first: int = 0) -> Iterator[_Row]:
    check_columns(table.schema, where, config)
    try:
        columns = [table[column].cast(pa.string()) for column in _columns(config).values()]
        for column in columns:
            column.validate(full=True)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise _fault(where, f"rows {first} to {first + len(table) - 1}", cut(error)) from None
    texts, names = columns[0].to_pylist(), columns[-1].to_pylist()
    for row, (text, name) in enumerate(zip(texts, names, strict=True), first):
        yield f"row {row}", text, name


def _json_rows(system: fs.FileSystem, path: str, config: DataConfig) -> Iterator[_Row]:
    for number, record in _records(system, path):
        yield f"line {number}", record.get(config.text_column), record.get(config.id_column or "")


def _text_rows(system: fs.FileSystem, path: str, config: DataConfig) -> Iterator[_Row]:
    for number, line in _lines(system, path):
        yield f"line {number}", line, None


def _tables(rows: Iterator[_Row], where: str, config: DataConfig) -> Iterator[pa.Table]:
    """Rows → tables of a few MB."""
    ids, texts, size = list[int](), list[str | None](), 0
    for place, value, name in rows:
        text = _string(value, f"data.text_column={config.text_column}", where, place)
        ids.append(document_id(_name(name, text, config, where, place)))
        texts.append(text)
        size += len(text or "")
        if size > _TABLE_BYTES or len(texts) == _TABLE_ROWS:
            yield pa.table([ids, texts], schema=DOCUMENTS)
            ids, texts, size = [], [], 0
    if texts:
        yield pa.table([ids, texts], schema=DOCUMENTS)


def _string(value: Any, setting: str, path: str, place: str) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise _fault(path, place, f"{setting} is {cut(json.dumps(value), 60)}, not a string; write it as a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _fault(path, place, f"{setting} holds half of a surrogate pair, which is no character") from None
    return value


def _name(value: Any, text: str | None, config: DataConfig, path: str, place: str) -> str:
    """What names a document: its id, or its text where the corpus has no ids."""
    if config.id_column is None:
        return text or ""
    if value is None and text is not None:
        remedy = "give every row one, or leave data.id_column out: then the text names the document"
        raise _fault(path, place, f"no {config.id_column}; {remedy}")
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return _string(value, f"data.id_column={config.id_column}", path, place) or ""


def _records(system: fs.FileSystem, path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and JSON object of each line that is not blank."""
    for number, line in _lines(system, path):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _fault(path, f"line {number}", f"no JSON ({cut(error)}): {line[:60]!r}") from None
        if not isinstance(record, dict):
            raise _fault(path, f"line {number}", f"one JSON object on each line is needed, and this is {line[:60]!r}")
        yield number, record


def _lines(system: fs.FileSystem, path: str) -> Iterator[tuple[int, str]]:
    """Numbered lines without their line breaks, which are \\n, \\r\\n and \\r: those that `datasets` and Python know."""
    number = 1
    with _named(path), system.open_input_stream(path, compression=compression_of(path)) as stream:
        for raw in io.BufferedReader(stream):
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                what = f"byte 0x{raw[error.start]:02x} at position {error.start} is no UTF-8; convert the file, as with iconv"
                raise _fault(path, f"line {number}", what) from None
            for line in io.StringIO(text, newline=None):
                yield number, line.removesuffix("\n")
                number += 1


@contextmanager
def _named(path: str, place: str = "") -> Iterator[None]:
    """What Arrow or the operating system says about a file gets the file's name."""
    try:
        yield
    except ConfigError:
        raise
    except (OSError, EOFError, pa.ArrowException) as error:
        raise ConfigError(
            f"{path}{place} cannot be read ({cut(error)}); copy or make the file again, or take it out of data.source"
        ) from None


def _fault(path: str, place: str, what: str) -> ConfigError:
    return ConfigError(f"{path}, {place}: {what}")


def _missing(name: str, column: str, where: str, columns: list[str]) -> ConfigError:
    return ConfigError(f"data.{name}={column} is not in {where}; its columns are {cut(', '.join(columns))}")


def _columns(config: DataConfig) -> dict[str, str]:
    """Setting → the column that it names."""
    return {"text_column": config.text_column, **({"id_column": config.id_column} if config.id_column else {})}
