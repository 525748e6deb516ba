"""A corpus that the AR model writes itself, by Ray actors."""

import json

import pyarrow.parquet as pq
import pytest

from kforcing.backbone import load_ar
from pipelines.config.overrides import apply
from pipelines.config.recipes import recipe
from pipelines.config.schema import SelfTextConfig
from pipelines.config.section import ConfigError
from pipelines.config.stages import corpus_spec
from pipelines.config.validation import validate
from pipelines.data.self_text import TextJob, student_of, write_self_text
from pipelines.data.token_store import MANIFEST
from pipelines.data.tokenise import prepare
from tests.endpoint import save_model
from tests.models import make_backbone, make_sequential

pytestmark = pytest.mark.cluster


@pytest.fixture
def teacher(tmp_path):
    folder = save_model(tmp_path / "teacher", chat=True)
    backbone = make_backbone(scale=2.0)
    backbone.generation_config.eos_token_id = 22
    backbone.save_pretrained(folder)
    return folder


SIZES = {"documents": 10, "docs_per_shard": 4, "user_tokens": 30, "answer_tokens": 16, "repetition": 1.0}


def test_a_killed_run_continues_with_the_missing_shards_and_a_changed_one_is_written_again(ray_here, teacher, tmp_path):
    job = TextJob(str(teacher), None, 0, SelfTextConfig(**SIZES), str(tmp_path / "cache"))
    folder = write_self_text(job)
    manifest = json.loads((folder / MANIFEST).read_text())
    names = [shard["file"] for shard in manifest["shards"]]
    assert names == [f"text-{i:06d}.parquet" for i in range(3)]
    tables = {name: pq.read_table(folder / name) for name in names}
    assert manifest["rows"] == sum(map(len, tables.values())) == 10 - sum(manifest["dropped"].values())
    assert all(text.startswith("u ") for table in tables.values() for text in table["text"].to_pylist())
    (folder / MANIFEST).unlink()
    (folder / names[1]).unlink()
    before = (folder / names[0]).stat().st_mtime_ns
    assert write_self_text(job) == folder
    assert pq.read_table(folder / names[1]).equals(tables[names[1]])
    assert (folder / names[0]).stat().st_mtime_ns == before
    again = json.loads((folder / MANIFEST).read_text())
    assert (again["rows"], again["tokens"], again["dropped"]) == (
        manifest["rows"],
        manifest["tokens"],
        manifest["dropped"],
    )
    content = bytearray((folder / names[2]).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / names[2]).write_bytes(content)
    write_self_text(job)
    assert pq.read_table(folder / names[2]).equals(tables[names[2]])
    assert (folder / names[0]).stat().st_mtime_ns == before


def written(cache, teacher, **changes):
    """The texts of a corpus by their numbers."""
    folder = write_self_text(TextJob(str(teacher), None, 0, SelfTextConfig(**SIZES, **changes), str(cache)))
    rows = [row for file in sorted(folder.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]
    return {row["number"]: (row["temperature"], row["text"]) for row in rows}


def test_a_student_writes_the_text_of_its_ar_model(ray_here, teacher, tmp_path):
    backbone = load_ar(str(teacher))
    student = make_sequential(backbone, 4, coupling="gumbel")
    student.save_pretrained(tmp_path / "student")
    texts = written(tmp_path / "by AR", teacher)
    assert texts
    assert written(tmp_path / "by a student", teacher, student=str(tmp_path / "student")) == texts


def test_a_student_of_another_model_writes_nothing(teacher, tmp_path):
    make_sequential(make_backbone(scale=3.0), 4, coupling="gumbel").save_pretrained(tmp_path / "student")
    with pytest.raises(ValueError, match=r"is not a student of this AR model: .* tensors differ"):
        student_of(load_ar(str(teacher)), str(tmp_path / "student"))


def refused(tmp_path, teacher, student):
    words = ["data.source=self", f"teacher.path={teacher}", f"self_text.student={student}"]
    config = apply(recipe("smoke"), {}, [*words, f"output_dir={tmp_path / 'run'}"])
    with pytest.raises(ConfigError) as error:
        validate(config)
    return str(error.value)


def test_a_writer_that_is_no_student_or_has_another_coupling_is_refused(teacher, tmp_path):
    assert refused(tmp_path, teacher, tmp_path / "nothing").startswith("self_text.student=")
    make_sequential(make_backbone(), 4, coupling="inverse_cdf").save_pretrained(tmp_path / "student")
    assert "coupling=inverse_cdf" in refused(tmp_path, teacher, tmp_path / "student")


def test_a_run_prepares_text_of_its_teacher(ray_here, teacher, tmp_path):
    words = [f"self_text.{name}={value}" for name, value in SIZES.items()]
    words += [
        f"teacher.path={teacher}",
        "data.source=self",
        "data.block=8",
        "eval.prompt_tokens=4",
        "eval.new_tokens=4",
    ]
    words += ["student.k=2", "rollout.windows=4", "eval.windows=4", "data.heldout_fraction=0.3"]
    config = apply(recipe("smoke"), {}, [*words, f"output_dir={tmp_path / 'run'}"])
    validate(config)
    prepared = prepare(corpus_spec(config))
    assert prepared.facts()["train"]["tokens"] > 0
    assert prepare(corpus_spec(config)) == prepared


def test_text_of_its_own_needs_a_given_model(tmp_path):
    config = apply(recipe("smoke"), {}, ["data.source=self", f"output_dir={tmp_path / 'run'}"])
    with pytest.raises(ConfigError, match=r"data\.source=self with teacher.path=None"):
        validate(config)
