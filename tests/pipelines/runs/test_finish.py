"""What a teacher says about its texts (EOS ids, chat template, special tokens) reaches every stage and the registry."""

import json

import pytest
from transformers import AutoTokenizer, GenerationConfig

from kforcing import LLM, SamplingParams
from kforcing.loading import load_tokenizer
from kforcing.pyfunc import TextGenerator
from pipelines.config.overrides import apply
from pipelines.config.recipes import recipe
from pipelines.config.stages import resolve
from pipelines.data.tokenise import Prepared
from pipelines.runs.finish import finish_stage
from pipelines.runs.stages import StageError, open_stage
from pipelines.runs.teacher import copy_teacher
from pipelines.tracking.registry import model_files
from pipelines.training.job import stage_job
from pipelines.training.worker import begin
from tests.endpoint import EOS, LETTERS, save_model
from tests.kforcing.test_complete import run as complete_file
from tests.models import make_backbone

SECOND_EOS = 7
TEMPLATE = "{% for m in messages %}{{ m.role[0] }} {{ m.content }} {% endfor %}"


@pytest.fixture
def stages(tmp_path):
    """The finished folders of a teacher with two EOS ids and a chat template, and of its students."""
    given, prepared = tmp_path / "given", Prepared(tmp_path / "corpus")
    save_model(given, chat=True)
    tokenizer = load_tokenizer(given)
    tokenizer.add_special_tokens({"additional_special_tokens": [LETTERS[3]]})
    tokenizer.save_pretrained(given)
    backbone = make_backbone()
    backbone.generation_config = GenerationConfig(eos_token_id=[EOS, SECOND_EOS])
    backbone.save_pretrained(given)
    load_tokenizer(given).save_pretrained(prepared.tokenizer)  # as a corpus keeps the tokenizer that it was made with
    config = apply(recipe("smoke"), {}, ["student.k=2"])
    done = [open_stage(tmp_path / "run", "teacher", "f0")]
    copy_teacher(str(given), None, str(done[0].folder))
    finish_stage(done[0], prepared)
    for spec in resolve(config):
        stage = open_stage(tmp_path / "run", spec.name, "f0")
        previous = str(done[-1].folder) if len(done) > 1 else None
        begin(stage_job(spec, str(stage.folder), "none", str(done[0].folder), previous))
        finish_stage(stage, prepared, done[0].folder)
        done.append(stage)
    return [stage.folder for stage in done]


def test_every_stage_holds_the_conventions_of_the_teacher(stages):
    for folder in stages:
        assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [EOS, SECOND_EOS]
        assert (folder / "chat_template.jinja").read_text() == TEMPLATE
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.eos_token == "|"
        assert LETTERS[3] in tokenizer.all_special_tokens


def test_every_stage_has_the_record_of_the_teachers_conventions(stages):
    records = [json.loads((folder / "conventions.json").read_text()) for folder in stages]
    assert records[0]["eos"] == {LETTERS[SECOND_EOS]: SECOND_EOS, "|": EOS}
    assert records == [records[0]] * 3


def test_a_student_that_lost_an_eos_id_on_the_way_is_not_finished(stages, tmp_path):
    folder = stages[-1]
    (folder / "manifest.json").unlink()
    GenerationConfig(eos_token_id=EOS).save_pretrained(folder)
    stage = open_stage(tmp_path / "run", "k2", "f0")
    with pytest.raises(
        StageError, match=r"stage k2: eos of the tokenizer in .* is {'\|': 22}, and was {'h': 7, '\|': 22}"
    ):
        finish_stage(stage, Prepared(tmp_path / "corpus"), stages[0])
    assert stage.manifest is None
    (stages[0] / "conventions.json").unlink()  # as an earlier release left its AR model
    finish_stage(stage, Prepared(tmp_path / "corpus"), stages[0])
    assert json.loads((folder / "conventions.json").read_text())["eos"] == {"|": EOS}


def test_the_registry_gets_all_of_these_files(stages):
    for folder in stages:
        files = {file.name for file in model_files(folder)}
        assert files == {f.name for f in folder.iterdir()} - {"stage.json", "manifest.json"}
        assert set(json.loads((folder / "manifest.json").read_text())["files"]) == files


def test_every_decoder_stops_at_all_eos_ids(stages, tmp_path, monkeypatch):
    student = stages[-1]
    llm, generator = LLM(student), TextGenerator(str(student))
    assert llm.eos_ids == generator.stop_ids == {EOS, SECOND_EOS}
    seed, answer = next(  # a seed whose text ends at the second EOS id
        (seed, output)
        for seed in range(100)
        if (output := llm.generate("abc", SamplingParams(max_tokens=40, seed=seed))[0].outputs[0]).stop_reason
        == SECOND_EOS
    )
    assert answer.finish_reason == "stop"
    assert generator.predict(["abc"], {"max_new_tokens": 40, "seed": seed}) == [answer.text]
    (tmp_path / "prompts.txt").write_text("abc\n")
    words = ["-o", tmp_path / "out.jsonl", "--max-new-tokens", 40, "--seed", seed]
    complete_file(monkeypatch, student, tmp_path / "prompts.txt", *words)
    record = json.loads((tmp_path / "out.jsonl").read_text())
    assert (record["finish_reason"], record["tokens"]) == ("stop", answer.token_ids)
