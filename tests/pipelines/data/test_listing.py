import bz2
import gzip
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.config.schema import DataConfig
from pipelines.config.section import ConfigError
from pipelines.data.corpus import check_source
from pipelines.data.listing import list_files
from pipelines.data.reading import read_documents

LINE = b'{"text": "%s"}\n'


def texts_of(source, **settings):
    """All texts of a source, read without Ray."""
    config = DataConfig(source=str(source), **settings)
    listing = check_source(config)
    tables = [table for file in listing.files for table in read_documents(listing.system, file.path, config)]
    return [text for table in tables for text in table["text"].to_pylist()]


def names(listing):
    return [file.path.rpartition("/")[2] for file in listing.files]


def test_compressed_files_and_capital_suffixes_are_read(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINE % b"a")
    (tmp_path / "B.JSONL").write_bytes(LINE % b"b")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(LINE % b"c") + gzip.compress(LINE % b"second member"))
    (tmp_path / "d.json.zst").write_bytes(pa.compress(LINE % b"d", "zstd", asbytes=True))
    (tmp_path / "e.Jsonl.BZ2").write_bytes(bz2.compress(LINE % b"e"))
    assert sorted(texts_of(tmp_path)) == ["a", "b", "c", "d", "e", "second member"]


def test_every_file_is_read_or_skipped_with_a_reason(tmp_path):
    (tmp_path / "a.txt").write_text("a\n")
    hidden = [".ipynb_checkpoints/a.txt", "._a.txt", "_temporary/0/a.txt", ".Trash-0/a.txt"]
    for name in [*hidden, "README.md", "b.txt.xz", "c.parquet.gz"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("b\n")
    (tmp_path / "zero.txt").touch()
    (tmp_path / "link.txt").symlink_to(tmp_path / "nowhere")
    listing = list_files(str(tmp_path))
    reasons = {path.removeprefix(f"{tmp_path}/"): reason for path, reason in listing.skipped.items()}
    assert names(listing) == ["a.txt"]
    found = {name for name, reason in reasons.items() if reason == "hidden or temporary"}
    assert found == {".ipynb_checkpoints", "._a.txt", "_temporary", ".Trash-0"}
    assert reasons["zero.txt"] == "empty"
    assert all(reasons[name].startswith("with another suffix") for name in ("README.md", "b.txt.xz", "c.parquet.gz"))
    assert reasons["link.txt"] == "no regular file, or a link that leads nowhere"
    assert len(reasons) == 9
    assert "1 text files, 2 bytes; 9 skipped: 4 hidden or temporary: " in str(listing)


def test_a_folder_whose_own_path_is_hidden_is_read(tmp_path):
    folder = tmp_path / ".cache" / "_x"
    folder.mkdir(parents=True)
    (folder / "a.txt").write_text("a\n")
    assert texts_of(folder) == texts_of(folder / "a.txt") == texts_of(f"{folder}/*.txt") == ["a"]


@pytest.mark.parametrize("name", ["a?.txt", "a[1].txt", "a*.txt", "a b.txt", "a%20b.txt", "ä#.txt"])
def test_a_name_is_a_name_before_it_is_a_pattern(tmp_path, name):
    (tmp_path / name).write_text("a\n")
    (tmp_path / "a1.txt").write_text("b\n")
    assert texts_of(tmp_path / name) == ["a"]
    assert sorted(texts_of(tmp_path)) == ["a", "b"]


def test_a_file_uri_is_the_same_as_its_path(tmp_path):
    folder = tmp_path / "a b"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(LINE % b"a")
    assert texts_of(folder.as_uri()) == texts_of(f"{folder.as_uri()}/a.jsonl") == texts_of(folder) == ["a"]


def test_a_file_that_is_named_itself_is_read_though_its_name_looks_temporary(tmp_path):
    (tmp_path / "_train.txt").write_text("a\n")
    assert texts_of(tmp_path / "_train.txt") == texts_of((tmp_path / "_train.txt").as_uri()) == ["a"]


def test_a_folder_that_cannot_be_read_is_skipped_and_named(tmp_path, monkeypatch):
    (tmp_path / "lost+found").mkdir()
    (tmp_path / "a.txt").write_text("a\n")
    scandir = os.scandir

    def refused(path):
        if str(path).endswith("lost+found"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)  # root, as whom tests may run, can read every folder
    listing = list_files(str(tmp_path))
    assert names(listing) == ["a.txt"]
    assert listing.skipped == {f"{tmp_path}/lost+found": "a folder that cannot be read (Permission denied)"}


def test_links_are_followed_and_each_folder_and_file_is_read_once(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.txt").write_text("a\n")
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "below").symlink_to(tmp_path / "real")
    (folder / "again").symlink_to(folder)
    (folder / "file.txt").symlink_to(tmp_path / "real" / "a.txt")
    listing = list_files(str(folder))
    assert names(listing) == ["a.txt"]
    assert listing.skipped == {f"{folder}/file.txt": "the same file as another that is read, through a link"}


def test_a_glob_reads_a_file_once_however_many_links_lead_to_it(tmp_path):
    (tmp_path / "part-9.txt").write_text("a\n")
    (tmp_path / "latest.txt").symlink_to("part-9.txt")
    (tmp_path / "self").symlink_to(".")
    listing = list_files(f"{tmp_path}/**/*.txt")
    assert [file.path for file in listing.files] == [f"{tmp_path}/part-9.txt"]
    assert f"{tmp_path}/latest.txt" in listing.skipped
    assert f"{tmp_path}/self/part-9.txt" in listing.skipped
    assert names(list_files(f"{tmp_path}/latest.txt")) == ["latest.txt"]


def test_a_name_that_is_no_utf8_is_refused(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("a\n")
    with pytest.raises(ConfigError, match=r"cannot be listed .*utf-8"):
        list_files(str(tmp_path))


def test_a_glob_selects_in_folders_below_too(tmp_path):
    for name in ("x/a.txt", "x/y/b.txt", "x/_tmp/c.txt", "d.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("a\n")
    assert names(list_files(f"{tmp_path}/**/*.txt")) == ["a.txt", "b.txt"]


def test_a_shard_with_other_columns_is_refused_by_name(tmp_path):
    for name, column in (("a", "text"), ("b", "body")):
        pq.write_table(pa.table({column: ["x"]}), tmp_path / f"{name}.parquet")
    with pytest.raises(ConfigError, match=r"data.text_column=text is not in .*/b.parquet; its columns are body"):
        texts_of(tmp_path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        pytest.param(
            "s3://127.0.0.1:9/x?endpoint_override=127.0.0.1:9&scheme=http",
            "cannot be listed .*onnect",
            marks=pytest.mark.long,
        ),
        ("gopher://x/y", "cannot be listed .*gopher"),
        ("file:///nowhere/at/all", "no .parquet, .jsonl, .json or .txt file there"),
    ],
)
def test_a_uri_that_cannot_be_listed_is_one_line(source, message):
    with pytest.raises(ConfigError, match=message) as error:
        list_files(source)
    assert len(str(error.value).splitlines()) == 1


def test_the_error_of_a_uri_does_not_show_its_password():
    with pytest.raises(ConfigError, match=r"data.source=gopher://\*\*\*@x/y cannot be listed") as error:
        list_files("gopher://me:secret@x/y")
    assert "secret" not in str(error.value)
