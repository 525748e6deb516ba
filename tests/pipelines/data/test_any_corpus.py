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
from pipelines.data.reading import read_documents

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
BESIDE = [".hidden.txt", "_temporary/a.jsonl", ".ipynb_checkpoints/a.parquet", "README.md", "a.txt.xz", "b.parquet.gz"]
TYPES = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
NOT_TEXT = [12, 1.5, True, ["a"], {"a": "b"}]


ANY: list = []


@dataclass
class File:
    """What is written, and the texts that must come back: None where it must be refused, ANY where either may happen."""

    name: str
    content: bytes
    texts: list | None


def texts(kind):
    text = st.one_of(st.sampled_from(LOOKALIKES), st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
    if kind == "text":
        return text.filter(lambda line: not set(line) & {"\n", "\r"} and not line.startswith("\ufeff"))
    return st.one_of(text, text, st.none())


@st.composite
def files(draw, kind):
    written = draw(st.lists(texts(kind), max_size=6))
    fault = draw(st.sampled_from([None, None, None, "value", "column", "encoding", "cut", "flip"]))
    content, expected = {"text": text_file, "json": json_file, "parquet": parquet_file}[kind](draw, written, fault)
    ending = draw(st.sampled_from([""] if kind == "parquet" else list(COMPRESS)))
    content = COMPRESS[ending](content)
    if fault in ("cut", "flip") and len(content) > 1:
        place, expected = draw(st.integers(1, len(content) - 1)), ANY
        flipped = content[:place] + bytes([content[place] ^ draw(st.integers(1, 255))]) + content[place + 1 :]
        content = content[:place] if fault == "cut" else flipped
    suffix = draw(
        st.sampled_from({"text": [".txt", ".TXT"], "json": [".jsonl", ".json"], "parquet": [".parquet"]}[kind])
    )
    return File(draw(st.sampled_from(NAMES)) + suffix + ending, content, [] if content == b"" else expected)


def text_file(draw, written, fault):
    data = draw(st.sampled_from(["\n", "\r\n", "\r"])).join([*written, ""] if draw(st.booleans()) else written)
    lines = [line.removesuffix("\n") for line in io.StringIO(data, newline=None)]
    if fault == "encoding":
        return b"caf\xe9\n" + data.encode(), None
    return draw(st.sampled_from([b"", b"\xef\xbb\xbf"])) + data.encode(), lines


def json_file(draw, written, fault):
    records = [
        {"id": "7", "text": text} if text is not None or draw(st.booleans()) else {"id": "8", "text": None}
        for text in written
    ]
    lines = [json.dumps(record, ensure_ascii=draw(st.booleans())).encode() for record in records]
    wrong = {
        "value": json.dumps({"text": draw(st.sampled_from(NOT_TEXT))}).encode(),
        "column": b'{"body": "a"}' if not lines else b'"text"',
        "encoding": draw(
            st.sampled_from([b'{"text": "caf\xe9"}', '{"text": "a"}'.encode("utf-16"), b'{"text": "\\udc00"}'])
        ),
    }
    if fault in wrong:
        lines.append(wrong[fault])
    blanks = draw(st.sampled_from([b"\n", b"\r\n", b"\n\n", b" \n"]))
    return blanks.join([*lines, b""]), None if fault in wrong else written


def parquet_file(draw, written, fault):
    column = pa.array(written, draw(st.sampled_from(TYPES)))
    if fault == "value":
        column = pa.array([draw(st.sampled_from(NOT_TEXT))])
    stream = io.BytesIO()
    pq.write_table(pa.table({"body" if fault == "column" else "text": column}), stream, row_group_size=2)
    return stream.getvalue(), None if fault in ("value", "column") else written


@st.composite
def corpora(draw):
    kind = draw(st.sampled_from(["text", "json", "parquet"]))
    made = draw(st.lists(files(kind), min_size=1, max_size=3, unique_by=lambda file: file.name.lower()))
    return made, draw(st.lists(st.sampled_from(BESIDE), max_size=3, unique=True))


def read(folder):
    """Texts of each file, in the order of paths, after the checks that a run makes."""
    config = DataConfig(source=str(folder))
    listing = check_source(config)
    tables = {file.path: list(read_documents(listing.system, file.path, config)) for file in listing.files}
    return listing, {path: [text for t in found for text in t["text"].to_pylist()] for path, found in tables.items()}


def check(case, compare=None):
    """A corpus is read as written, and every file is accounted for; or one line names a file that is wrong."""
    made, beside = case
    with tempfile.TemporaryDirectory() as folder:
        for name, content in [*((file.name, file.content) for file in made), *((name, b"x\n") for name in beside)]:
            path = Path(folder, name)
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        expected = {f"{folder}/{file.name}": file.texts for file in made}
        try:
            listing, found = read(folder)
        except ConfigError as error:
            refused(str(error), folder, expected)
            return
        assert {file.path for file in listing.files} | set(listing.skipped) == {
            str(p) for p in Path(folder).rglob("*") if p.is_file()
        }
        assert set(listing.skipped) == {f"{folder}/{name}" for name in beside} | {
            p for p in expected if not Path(p).stat().st_size
        }
        for path, rows in found.items():
            assert expected[path] is ANY or rows == expected[path]
            if compare:
                compare(path, rows)


def refused(message, folder, expected):
    assert len(message.splitlines()) == 1
    wrong = [path for path, texts in expected.items() if texts is None or texts is ANY]
    empty = not any(text and text.strip() for texts in expected.values() for text in texts or [])
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
        if texts and (texts[0] or "").startswith("\ufeff"):  # the byte order mark, which it keeps
            texts = [text for text in [texts[0][1:]] if text or len(texts) > 1] + texts[1:]
        assert rows == texts


def cases(count):
    quiet = list(HealthCheck)
    return settings(max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=quiet)


@cases(100)
@given(corpora())
def test_any_corpus_is_read_as_written_or_refused_in_one_line(case):
    check(case)


@pytest.mark.slow
@cases(2000)
@given(corpora())
def test_2000_corpora_are_read_as_datasets_reads_them_or_refused_in_one_line(case):
    check(case, compare_with_datasets)
