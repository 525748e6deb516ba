"""State files of a run directory that are empty or cut, and places where a run cannot be."""

import json
from pathlib import Path

import pytest

from pipelines.config.section import ConfigError
from pipelines.files import checksum
from pipelines.runs.stages import claim, hold, open_stage, open_whole_stage
from pipelines.training.checkpoints import latest_checkpoint, set_changed_aside


@pytest.fixture
def warnings(caplog):
    return caplog


@pytest.mark.parametrize("text", ["", '{"stage": "k2", "finger'])
def test_a_finished_stage_is_known_by_its_manifest_where_stage_json_is_cut(tmp_path, text, warnings):
    open_stage(tmp_path, "k2", "f00").finish(files=[])
    (tmp_path / "k2" / "stage.json").write_text(text)
    assert open_stage(tmp_path, "k2", "f00").manifest["files"] == []
    assert f"{tmp_path / 'k2' / 'stage.json'} is empty or cut" in warnings.text


def test_work_without_a_readable_fingerprint_is_kept_under_a_name_of_its_own_each_time(tmp_path, warnings):
    for name in ("k2-unmarked", "k2-unmarked-2", "k2-unmarked-3"):
        folder = open_stage(tmp_path, "k2", "f00").folder
        (folder / "stage.json").write_text("")
        (folder / "work").write_text(name)
        open_stage(tmp_path, "k2", "f00")
        assert (tmp_path / "archive" / name / "work").read_text() == name
        assert f"it is now {tmp_path / 'archive' / name}, and the stage starts anew" in warnings.text


@pytest.mark.parametrize("text", ["", "{"])
def test_a_stage_whose_manifest_is_cut_is_not_finished(tmp_path, text, warnings):
    stage = open_stage(tmp_path, "k2", "f00")
    (stage.folder / "manifest.json").write_text(text)
    assert open_stage(tmp_path, "k2", "f00").manifest is None
    assert f"{stage.folder / 'manifest.json'} is empty or cut" in warnings.text


def test_a_run_whose_marker_is_cut_goes_on(tmp_path, warnings):
    (tmp_path / "run.json").write_text("")
    claim(tmp_path, "smoke")
    assert f"{tmp_path / 'run.json'} is empty or cut" in warnings.text


def checkpoint(folder, step, record=True):
    place = folder / f"step-{step:08d}"
    place.mkdir(parents=True)
    (place / "weights.pt").write_text("whole")
    text = f'{{"tag": "{place.name}", "step": {step}, "world_size": 2, "bytes": {{"weights.pt": 5}}}}'
    for file in [place / "latest.json", folder / "latest.json"] if record else []:
        file.write_text(text)
    return place


def test_a_stage_comes_back_from_the_archive_when_its_settings_are_changed_back(tmp_path):
    first = open_stage(tmp_path, "k2", "a" * 16)
    first.finish(figure=1)
    second = open_stage(tmp_path, "k2", "b" * 16)
    assert second.manifest is None
    second.finish(figure=2)
    assert open_stage(tmp_path, "k2", "a" * 16).manifest["figure"] == 1
    assert open_stage(tmp_path, "k2", "b" * 16).manifest["figure"] == 2


def test_the_newest_whole_checkpoint_is_used_whatever_was_cut(tmp_path, warnings):
    assert latest_checkpoint(tmp_path) is None
    checkpoint(tmp_path, 8)
    last = checkpoint(tmp_path, 16)
    checkpoint(tmp_path, 24, record=False)  # its writer was killed
    assert latest_checkpoint(tmp_path)["step"] == 16
    (tmp_path / "latest.json").write_text('{"tag": "st')
    assert latest_checkpoint(tmp_path)["step"] == 16
    assert f"{tmp_path / 'latest.json'} is empty or cut" in warnings.text
    (last / "weights.pt").write_text("who")
    assert latest_checkpoint(tmp_path)["step"] == 8
    assert f"{last / 'weights.pt'} is missing or cut" in warnings.text


def checksummed(folder, step):
    place = checkpoint(folder, step)
    record = json.loads((place / "latest.json").read_text()) | {"crc32": {"weights.pt": checksum(place / "weights.pt")}}
    for file in (place / "latest.json", folder / "latest.json"):
        file.write_text(json.dumps(record))
    return place


def test_a_checkpoint_with_a_flipped_byte_is_set_aside_and_the_one_before_is_used(tmp_path, warnings):
    first, last = checksummed(tmp_path, 8), checksummed(tmp_path, 16)
    set_changed_aside(tmp_path)
    assert latest_checkpoint(tmp_path)["step"] == 16
    assert warnings.records == []
    (last / "weights.pt").write_text("whOle")
    set_changed_aside(tmp_path)
    assert latest_checkpoint(tmp_path)["step"] == 8
    assert (tmp_path / "changed-step-00000016" / "weights.pt").read_text() == "whOle"
    (first / "weights.pt").write_text("Whole")
    set_changed_aside(tmp_path)
    assert latest_checkpoint(tmp_path) is None
    assert [record.getMessage().split(";")[0] for record in warnings.records] == [
        f"{place / 'weights.pt'} does not hold what was written to it" for place in (last, first)
    ]


def test_a_checkpoint_of_an_earlier_release_has_no_sizes(tmp_path):
    (tmp_path / "step-00000008").mkdir()
    (tmp_path / "latest.json").write_text('{"tag": "step-00000008", "step": 8, "world_size": 1}')
    set_changed_aside(tmp_path)
    assert latest_checkpoint(tmp_path)["step"] == 8


def finished_part(root):
    stage = open_whole_stage(root, "references", "f00")
    (stage.folder / "inner").mkdir()
    (stage.folder / "inner" / "blocks.npz").write_text("blocks")
    (stage.folder / "verdicts.jsonl").write_text("{}\n")
    stage.finish(result=1, checksums=stage.checksums)
    return stage.folder


@pytest.mark.parametrize("text", ["", "block", "blOcks"])
def test_a_part_of_an_evaluation_starts_anew_when_a_file_of_it_has_changed(tmp_path, warnings, text):
    folder = finished_part(tmp_path)
    (folder / "verdicts.jsonl").write_text("{}\n{}\n")  # lines are added when questions are asked
    assert open_whole_stage(tmp_path, "references", "f00").manifest["result"] == 1
    (folder / "inner" / "blocks.npz").write_text(text)
    again = open_whole_stage(tmp_path, "references", "f00")
    assert again.manifest is None
    assert [file.name for file in folder.iterdir()] == ["stage.json"]
    (line,) = (record.getMessage() for record in warnings.records)
    place = tmp_path / "archive" / "references-changed"
    assert line.startswith(f"{folder}/inner/blocks.npz does not hold what was written to it; its folder is now {place}")
    assert (place / "inner" / "blocks.npz").read_text() == text


def test_places_where_a_run_cannot_be_are_refused_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file is a file, not a folder; choose another output_dir"):
        claim(tmp_path / "file" / "run", "smoke")
    with pytest.raises(ConfigError, match="File name too long; choose another output_dir"):
        claim(tmp_path / ("x" * 300), "smoke")
    with pytest.raises(ConfigError, match="output_dir=/proc/run cannot be written to"):
        hold(Path("/proc/run"), "busy")
