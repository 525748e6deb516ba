import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.config.schema import DataConfig
from pipelines.config.section import ConfigError
from pipelines.data.corpus import check_source
from pipelines.data.reading import document_id, read_documents
from tests.pipelines.data.test_listing import texts_of


def documents_of(source, **settings):
    """(document, text) of all rows of a source."""
    config = DataConfig(source=str(source), **settings)
    listing = check_source(config)
    tables = [table for file in listing.files for table in read_documents(listing.system, file.path, config)]
    return list(zip(*(pa.concat_tables(tables)[name].to_pylist() for name in ("doc", "text")), strict=True))


def json_lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_json_texts_and_ids_arrive_as_they_were_written(tmp_path):
    texts = ["0012", "1.50", "nan", "null", "2020-01-01", "2020-01-01T00:00:00Z", "true", "1e5", "", " a\tb ", "😀"]
    ids = ["007", "7", "1.0", "nan", 12, 2**70, -1, "x", "", "é", "b"]
    file = json_lines(tmp_path / "a.jsonl", *({"date": t, "key": i} for t, i in zip(texts, ids, strict=True)))
    rows = documents_of(file, text_column="date", id_column="key")
    assert rows == [(document_id(str(i)), t) for t, i in zip(texts, ids, strict=True)]


def test_a_document_without_an_id_column_is_named_by_its_text(tmp_path):
    file = json_lines(tmp_path / "a.jsonl", {"text": "a"}, {"text": None}, {"other": 1}, {"text": "a"})
    assert [text for _, text in documents_of(file)] == ["a", None, None, "a"]
    assert documents_of(file)[0] == documents_of(file)[3] == (document_id("a"), "a")


def test_a_text_may_be_missing_in_the_first_line_but_not_in_all_of_the_first_100(tmp_path):
    assert documents_of(json_lines(tmp_path / "a.jsonl", {"title": "x"}, {"text": "a"}))[1][1] == "a"
    file = json_lines(tmp_path / "b.jsonl", *[{"title": "x"}] * 100, {"text": "a"})
    with pytest.raises(ConfigError, match=r"data.text_column=text is not in .*/b.jsonl; its columns are title"):
        documents_of(file)


def test_text_is_split_at_line_breaks_alone(tmp_path):
    (tmp_path / "a.txt").write_bytes("one\u2028still\x0cone\x85\x1c\ntwo\r\n\r\nfour\rfive\nno break".encode())
    assert texts_of(tmp_path) == ["one\u2028still\x0cone\x85\x1c", "two", "", "four", "five", "no break"]


def test_a_byte_order_mark_belongs_to_no_document(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa\n")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "b"}\n')
    assert texts_of(tmp_path / "a.txt") == ["a"]
    assert texts_of(tmp_path / "b.jsonl") == ["b"]


TYPES = {
    "large": pa.large_string(),
    "view": pa.string_view(),
    "categories": pa.dictionary(pa.int32(), pa.string()),
    "plain": pa.string(),
}


@pytest.mark.parametrize("kind", TYPES)
def test_every_kind_of_string_column_is_read(tmp_path, kind):
    pq.write_table(pa.table({"text": pa.array(["a", None, "0012"], TYPES[kind])}), tmp_path / "a.parquet")
    assert texts_of(tmp_path) == ["a", None, "0012"]


def test_a_large_parquet_file_arrives_in_pieces_and_in_order(tmp_path):
    texts = [f"{i} " + "x" * 100_000 for i in range(200)]
    pq.write_table(pa.table({"text": texts, "id": range(200)}), tmp_path / "a.parquet", row_group_size=70)
    config = DataConfig(source=str(tmp_path), id_column="id")
    listing = check_source(config)
    tables = list(read_documents(listing.system, listing.files[0].path, config))
    assert max(table.nbytes for table in tables) < 10 << 20
    assert [text for table in tables for text in table["text"].to_pylist()] == texts


WRONG_LINES = {
    b'{"text": "caf\xe9"}': "byte 0xe9 at position 13 is no UTF-8",
    b'{"text": ': "no JSON",
    b'{"text": "abc': "no JSON",
    b'["a"]': "one JSON object on each line",
    b'{"text": ["a"]}': r'data.text_column=text is \["a"\], not a string',
    b'{"text": 12}': "data.text_column=text is 12, not a string",
    b'{"text": "\\ud800"}': "half of a surrogate pair",
    b'{"text": "a", "id": 1.5}': "data.id_column=id is 1.5, not a string",
    b'{"text": "a", "id": true}': "data.id_column=id is true, not a string",
    b'{"text": "a", "id": null}': "no id; give every row one",
    b"[" * 100_000: "no JSON",
}


@pytest.mark.parametrize("line", WRONG_LINES, ids=lambda line: line[:30].decode("latin-1"))
def test_a_wrong_line_is_refused_with_file_and_line(tmp_path, line):
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "a", "id": "a"}\n\n' + line + b"\n")
    with pytest.raises(ConfigError, match=r"^.*/b.jsonl, line 3: .*" + WRONG_LINES[line]) as error:
        texts_of(tmp_path, id_column="id")
    assert len(str(error.value).splitlines()) == 1


COLUMNS = {
    "list": ({"text": [["a"]]}, "that column has the type list<element: string>, not text"),
    "struct": ({"text": [{"a": "b"}]}, "that column has the type struct<a: string>, not text"),
    "number": ({"text": [12]}, "that column has the type int64, not text"),
    "bytes": ({"text": [b"a"]}, "that column has the type binary, not text"),
    "id": ({"text": ["a"], "id": [1.5]}, "data.id_column=id: .* type double, not text or whole numbers"),
    "no id": ({"text": ["a", "b"], "id": ["x", None]}, "a.parquet, row 1: no id"),
}


@pytest.mark.parametrize("case", COLUMNS)
def test_a_wrong_column_is_refused_with_its_file(tmp_path, case):
    columns, message = COLUMNS[case]
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=rf"a\.parquet.*{message}|{message}") as error:
        texts_of(tmp_path, id_column="id" if "id" in case else None)
    assert "a.parquet" in str(error.value)


def test_a_damaged_parquet_file_is_refused_with_its_rows(tmp_path):
    pq.write_table(pa.table({"text": ["abc"] * 300}), tmp_path / "a.parquet")
    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(content[:4] + b"\xff" * 40 + content[44:])
    with pytest.raises(ConfigError, match=r"/a\.parquet, from row 0 on, cannot be read"):
        texts_of(tmp_path)
    (tmp_path / "a.parquet").write_bytes(content[:-20])
    with pytest.raises(ConfigError, match=r"/a\.parquet cannot be read"):
        texts_of(tmp_path)


def test_invalid_utf8_in_parquet_is_refused_with_its_rows(tmp_path):
    offsets, bad = pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")
    column = pa.StringArray.from_buffers(1, offsets, bad)
    pq.write_table(pa.table({"text": pa.concat_arrays([pa.array(["a"]), column])}), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"/a\.parquet, rows 0 to 1: .*UTF8"):
        texts_of(tmp_path)
