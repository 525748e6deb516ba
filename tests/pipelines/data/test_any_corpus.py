"""Corpora at random, right and wrong: each is read as it was written, or refused in one line that names the file.

A case is a folder of one to three files of one kind, with names, compressions, values, types and encodings at random, and
files beside them that are no part of a corpus. What was written says what must be read; the slow test compares with
`datasets` as well.
"""

import bz2
import gzip
import io
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines.config.schema import DataConfig
from pipelines.config.section import ConfigError
from pipelines.data.corpus import check_source
from pipelines.data.listing import compression_of, kind_of
from pipelines.data.reading import document_id, read_documents

COMPRESS = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".zst": lambda data: pa.compress(data, "zstd", asbytes=True),
}
NAMES = ["a", "A b", "b?", "c[1]", "d*", "e%20", "ä", "x#y", "new\nline", "n.1"]
LOOKALIKES = [
    "0012",
    "1.50",
    "nan",
    "null",
    "2020-01-01",
    "2020-01-01 00:00:00",
    "true",
    "1e5",
    "",
    " ",
    "<|endoftext|>",
    "[]",
]


def skipped_as(name):
    """A hidden folder is one entry, whatever it holds."""
    first = name.split("/")[0]
    return first if first[0] in "._" else name


BESIDE = [".hidden.txt", "_temporary/a.jsonl", ".ipynb_checkpoints/a.parquet", "README.md", "a.txt.xz", "b.parquet.gz"]
TYPES = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
NOT_TEXT = [12, 1.5, True, ["a"], {"a": "b"}]


ANY: list = []


@dataclass
class File:
    """What is written, and the (id, text) that must come back: None where it must be refused, ANY where either may happen."""

    name: str
    content: bytes
    rows: list | None


def texts(kind):
    text = st.one_of(st.sampled_from(LOOKALIKES), st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
    if kind == "text":
        return text.filter(lambda line: not set(line) & {"\n", "\r"} and not line.startswith("\ufeff"))
    return st.one_of(text, text, st.none())


@st.composite
def files(draw, kind, ids):
    names = st.integers(-5, 2**60) if ids == "numbers" else texts("text")
    written = draw(st.lists(st.tuples(names, texts(kind)), max_size=6))
    fault = draw(st.sampled_from([*[None] * 8, "value", "column", "encoding", "id", "cut", "flip"]))
    content, wrong = {"text": text_file, "json": json_file, "parquet": parquet_file}[kind](draw, written, ids, fault)
    ending = draw(st.sampled_from([""] if kind == "parquet" else list(COMPRESS)))
    content = COMPRESS[ending](content)
    rows = None if wrong else [(name if ids else None, text) for name, text in written]
    if fault in ("cut", "flip") and len(content) > 1:
        place, rows = draw(st.integers(1, len(content) - 1)), ANY
        flipped = content[:place] + bytes([content[place] ^ draw(st.integers(1, 255))]) + content[place + 1 :]
        content = content[:place] if fault == "cut" else flipped
    suffix = draw(
        st.sampled_from({"text": [".txt", ".TXT"], "json": [".jsonl", ".json"], "parquet": [".parquet"]}[kind])
    )
    return File(draw(st.sampled_from(NAMES)) + suffix + ending, content, rows)


def text_file(draw, written, ids, fault):
    lines, line_break = [text for _, text in written], draw(st.sampled_from(["\n", "\r\n", "\r"]))
    last = line_break if lines and (not lines[-1] or draw(st.booleans())) else ""
    mark = draw(st.sampled_from([b"", b"\xef\xbb\xbf"])) if lines else b""
    wrong = fault == "encoding"
    return mark + b"caf\xe9\n" * wrong + (line_break.join(lines) + last).encode(), wrong


def json_file(draw, written, ids, fault):
    records = [{"text": text} | ({"id": name} if ids else {}) for name, text in written]
    for record in records[1:]:
        if record["text"] is None and draw(st.booleans()):
            del record["text"]
    lines = [json.dumps(record, ensure_ascii=draw(st.booleans())).encode() for record in records]
    wrong = {
        "value": json.dumps({"id": "7", "text": draw(st.sampled_from(NOT_TEXT))}).encode(),
        "column": b'"text"' if lines else b'{"body": "a"}',
        "encoding": draw(
            st.sampled_from([b'{"text": "caf\xe9"}', '{"text": ""}'.encode("utf-16"), b'{"text": "\\udc00"}'])
        ),
    }
    if ids:
        wrong["id"] = json.dumps({"text": "a", "id": draw(st.sampled_from([None, 1.5, True, ["a"]]))}).encode()
    lines += [wrong[fault]] if fault in wrong else []
    return draw(st.sampled_from([b"\n", b"\r\n", b"\n\n", b" \n"])).join([*lines, b""]), fault in wrong


def parquet_file(draw, written, ids, fault):
    columns = {"text": pa.array([text for _, text in written], draw(st.sampled_from(TYPES)))}
    if ids:
        columns["id"] = pa.array([name for name, _ in written], pa.int64() if ids == "numbers" else pa.string())
    if fault == "value":
        columns["text"] = pa.array([draw(st.sampled_from(NOT_TEXT))] * len(written) or [1])
        columns = columns if written else {"text": columns["text"]}
    elif fault == "column":
        columns["body"] = columns.pop("text")
    elif fault == "id" and ids:
        columns = {
            "text": pa.array(["a", "b"]),
            "id": draw(st.sampled_from([pa.array(["x", None]), pa.array([1.5, 2.5])])),
        }
    stream = io.BytesIO()
    pq.write_table(pa.table(columns), stream, row_group_size=2)
    return stream.getvalue(), fault in ("value", "column") or (fault == "id" and bool(ids))


@st.composite
def corpora(draw):
    kind = draw(st.sampled_from(["text", "json", "parquet"]))
    ids = draw(st.sampled_from(["", "numbers", "names"])) if kind != "text" else ""
    made = draw(st.lists(files(kind, ids), min_size=1, max_size=3, unique_by=lambda file: file.name.lower()))
    return made, draw(st.lists(st.sampled_from(BESIDE), max_size=3, unique=True)), "id" if ids else None


def read(config):
    """Rows of each file, after the checks that a run makes."""
    listing = check_source(config)
    tables = {file.path: list(read_documents(listing.system, file.path, config)) for file in listing.files}
    return listing, {
        path: [tuple(row.values()) for t in found for row in t.to_pylist()] for path, found in tables.items()
    }


def check(case, compare=None):
    """A corpus is read as written, and every file is accounted for; or one line names a file that is wrong."""
    made, beside, id_column = case
    with tempfile.TemporaryDirectory() as folder:
        for name, content in [*((file.name, file.content) for file in made), *((name, b"x\n") for name in beside)]:
            path = Path(folder, name)
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        expected = {f"{folder}/{file.name}": file.rows for file in made}
        try:
            listing, found = read(DataConfig(source=folder, id_column=id_column))
        except ConfigError as error:
            refused(str(error), folder, expected)
            return
        empty = {path for path in expected if not Path(path).stat().st_size}
        assert set(listing.skipped) == {f"{folder}/{skipped_as(name)}" for name in beside} | empty
        assert set(found) == set(expected) - empty
        for path, rows in found.items():
            if expected[path] is not ANY:
                ids = [text if name is None else str(name) for name, text in expected[path]]
                assert rows == [(document_id(i or ""), text) for i, (_, text) in zip(ids, expected[path], strict=True)]
            if compare:
                compare(path, [text for _, text in rows])


def refused(message, folder, expected):
    assert len(message.splitlines()) == 1
    wrong = [path for path, rows in expected.items() if rows is None or rows is ANY]
    empty = not any(text and text.strip() for rows in expected.values() for _, text in rows or [])
    named = any(" ".join(path.splitlines()) in message for path in wrong)
    assert named or (empty and folder in message), message


def compare_with_datasets(path, rows):
    """`datasets` reads the same, where it reads the file at all and takes its texts for strings."""
    import datasets

    kind, ending = kind_of(path), path[path.rindex(".") :] if compression_of(path) else ""
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copy(path, f"{folder}/copy.{kind}{ending}")
        try:
            records = list(datasets.load_dataset(kind, data_files=copy, split="train", streaming=True))
        except Exception:  # for example, it reads no zstd
            return
    texts = [record.get("text") for record in records]
    if all(text is None or isinstance(text, str) for text in texts):
        if texts and (texts[0] or "").startswith("\ufeff"):  # it keeps the byte order mark, even of an empty file
            texts[0] = texts[0][1:]
        assert rows == texts or (rows, texts) == ([], [""])


def cases(count):
    quiet = list(HealthCheck)
    return settings(max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=quiet)


@pytest.mark.long
@cases(100)
@given(corpora())
def test_any_corpus_is_read_as_written_or_refused_in_one_line(case):
    check(case)


@pytest.mark.slow
@cases(2000)
@given(corpora())
def test_2000_corpora_are_read_as_datasets_reads_them_or_refused_in_one_line(case):
    check(case, compare_with_datasets)
