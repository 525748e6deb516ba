import hashlib
import json
import os
import zlib

import pytest

from pipelines import files
from pipelines.files import (
    added_files,
    atomic_file,
    atomic_folder,
    atomic_write,
    changed,
    checksum,
    read_json,
    strict_json,
    write_json,
)


def test_a_file_is_replaced_as_a_whole(tmp_path):
    file = tmp_path / "a.txt"
    atomic_write(file, "é")
    assert file.read_bytes() == "é".encode()
    atomic_write(file, b"\x00\xff")
    assert file.read_bytes() == b"\x00\xff"
    write_json(file, {"a": [1, None]})
    assert json.loads(file.read_text()) == {"a": [1, None]}
    assert [f.name for f in tmp_path.iterdir()] == ["a.txt"]


def test_a_failed_write_leaves_the_earlier_file_and_nothing_else(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("earlier")

    def fail():
        with atomic_file(file) as partial:
            partial.write_text("half")
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        fail()
    assert file.read_text() == "earlier"
    assert [f.name for f in tmp_path.iterdir()] == ["a.txt"]


def test_a_folder_appears_with_all_its_files_or_not_at_all(tmp_path):
    (tmp_path / ".a.partial").mkdir()
    (tmp_path / ".a.partial" / "left").write_text("by a killed process")

    def fill(fails):
        with atomic_folder(tmp_path / "a") as partial:
            (partial / "inner").mkdir()
            (partial / "inner" / "one").write_text("1")
            if fails:
                raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        fill(fails=True)
    assert list(tmp_path.iterdir()) == []
    fill(fails=False)
    assert sorted(f.relative_to(tmp_path).as_posix() for f in tmp_path.rglob("*")) == ["a", "a/inner", "a/inner/one"]


def test_the_named_file_is_added_to_a_folder_after_all_others(tmp_path, monkeypatch):
    moved, real = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (moved.append(b.name), real(a, b)))
    (tmp_path / "manifest").write_text("stays")
    with added_files(tmp_path, last="config.json") as partial:
        for name in ("config.json", "a.bin", "z.bin"):
            (partial / name).write_text(name)
    assert sorted(moved[:2]) == ["a.bin", "z.bin"]
    assert moved[2:] == ["config.json"]
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a.bin", "config.json", "manifest", "z.bin"]


def test_the_content_is_on_disk_before_the_file_has_its_name(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, real=real: (calls.append(name), real(*a))[1])
    atomic_write(tmp_path / "a.txt", "x")
    assert calls == ["fsync", "replace", "fsync"]


def test_numbers_that_json_has_no_word_for_become_null(tmp_path):
    nan, inf = float("nan"), float("inf")
    assert strict_json({"a": [nan, (inf, -inf), 1.5], "b": {"c": nan, "d": True}}) == (
        '{"a": [null, [null, null], 1.5], "b": {"c": null, "d": true}}'
    )
    write_json(tmp_path / "a.json", {"a": nan})
    assert json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail) == {"a": None}


def test_the_digest_of_a_large_file_is_kept_by_its_size_and_time(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_KEPT_FROM", 4)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "weights"
    file.write_bytes(b"large")
    first = files.content_digest(file)
    (kept,) = (tmp_path / "cache").rglob("*/digests/*")
    assert kept.read_text() == first
    kept.write_text("kept")
    assert files.content_digest(file) == "kept"
    os.utime(file, (1, 1))
    assert files.content_digest(file) == first
    file.write_bytes(b"other")
    assert files.content_digest(file) != first


def test_a_digest_needs_no_folder_to_be_kept_in(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_KEPT_FROM", 0)
    (tmp_path / "no folder").write_bytes(b"x")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "no folder"))
    assert files.content_digest(tmp_path / "no folder") == hashlib.blake2b(b"x", digest_size=16).hexdigest()


def test_a_flipped_byte_a_cut_file_and_a_missing_one_are_told_from_what_was_written(tmp_path):
    content = bytes(range(256)) * 40_000  # more than is read at once
    for name in "abcd":
        (tmp_path / name).write_bytes(content)
    sums = {name: checksum(tmp_path / name) for name in "abcd"}
    assert set(sums.values()) == {zlib.crc32(content)}
    assert changed(tmp_path, sums) == []
    (tmp_path / "a").write_bytes(content[:5_000_000] + b"\x01" + content[5_000_001:])
    (tmp_path / "b").write_bytes(content[:-1])
    (tmp_path / "c").unlink()
    assert changed(tmp_path, sums) == ["a", "b", "c"]


def test_a_cut_record_is_named_once_and_read_as_none(tmp_path, caplog):
    for text in ("", '{"a": 1'):
        (tmp_path / "a.json").write_text(text)
        assert [read_json(tmp_path / "a.json"), read_json(tmp_path / "a.json")] == [None, None]
    assert read_json(tmp_path / "none.json") is None
    assert [record.getMessage().split(" (")[0] for record in caplog.records] == [
        f"{tmp_path}/a.json is empty or cut"
    ] * 2
