import json
import os

import pytest

from pipelines.files import atomic_file, atomic_write, write_json


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


def test_the_content_is_on_disk_before_the_file_has_its_name(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, real=real: (calls.append(name), real(*a))[1])
    atomic_write(tmp_path / "a.txt", "x")
    assert calls == ["fsync", "replace", "fsync"]
