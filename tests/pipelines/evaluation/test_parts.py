"""Parts of an evaluation are finished once, and again when what they left is damaged."""

import pytest

from pipelines.evaluation.parts import Part, run_parts

pytestmark = pytest.mark.cluster


def parts(log):
    """`first` leaves a file, which `second` reads; each adds its name to a log."""

    def first(folder, task, given):
        (folder / "blocks.npz").write_text("blocks")
        with open(log, "a") as file:
            file.write("first\n")
        return 1

    def second(folder, task, given):
        with open(log, "a") as file:
            file.write("second\n")
        return given["first"] + len((folder.parent / "first" / "blocks.npz").read_text())

    return [Part("first", (), first, None), Part("second", (), second, None, ("first",))]


def test_only_damaged_parts_run_again(ray_here, tmp_path, caplog):
    root, log = tmp_path / "evaluation", tmp_path / "log"

    def ran():
        log.write_text("")
        assert run_parts(parts(log), root, 1, 0, 1) == {"first": 1, "second": 7}
        return log.read_text().split()

    assert ran() == ["first", "second"]
    assert ran() == []
    (root / "first" / "blocks.npz").write_text("blOcks")
    assert ran() == ["first"]
    for text in ("", '{"result": 1'):
        (root / "second" / "manifest.json").write_text(text)
        assert ran() == ["second"]
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [line.split(" ")[0] for line in warned] == [
        f"{root}/first/blocks.npz",
        *[f"{root}/second/manifest.json"] * 2,
    ]
