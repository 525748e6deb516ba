import os
import shutil

from pipelines.config.overrides import apply
from pipelines.config.recipes import recipe
from pipelines.config.stages import corpus_spec, evaluation_fingerprint, model_digest, resolve, stage_spec, teacher_spec
from pipelines.training.job import stage_job


def config(*words):
    return apply(recipe("smoke"), {}, words)


def test_a_stage_takes_its_exceptions_and_the_settings_of_the_run():
    one, two, four = resolve(config("stages.k2.train.steps=5", "stages.k2.targets=self", "rollout.draws=3"))
    assert [spec.name for spec in (one, two, four)] == ["k1", "k2", "k4"]
    assert (two.train.steps, two.targets, two.rollout.draws) == (5, "self", 3)
    assert (four.train.steps, four.targets, four.rollout.draws) == (24, "ar", 3)


def test_the_first_stage_has_the_ar_teacher_alone():
    one, two, _ = resolve(config("targets=self", "loss=hard"))
    assert (one.targets, one.train.warm_start) == ("ar", "teacher")
    assert (two.targets, two.train.warm_start) == ("self", "previous")


def test_only_a_soft_loss_asks_for_probabilities():
    assert stage_spec(config(), 2).rollout.teacher_top_k == 32
    assert stage_spec(config("loss=hard"), 2).rollout.teacher_top_k is None


def test_training_on_text_has_one_stage_of_any_k():
    (stage,) = resolve(config("targets=text", "loss=kl", "student.k=3"))
    assert (stage.name, stage.k, stage.targets, stage.train.warm_start) == ("k3", 3, "text", "teacher")
    job = stage_job(stage, "folder", "store", "teacher", None)
    assert (job.rollout_job, job.text_k, job.init.k) == (None, 3, 3)


def test_sampled_tokens_change_the_names_of_text_stages_only():
    def name(*words):
        return resolve(config(*words))[-1].fingerprint("corpus", "teacher", "previous")

    assert name("train.sampled_tokens=9") == name()
    text = ("targets=text", "loss=kl")
    assert name(*text, "train.sampled_tokens=9") != name(*text)
    assert name(*text, "rollout.draws=3") == name(*text)


def test_settings_without_an_effect_do_not_rename_a_stage():
    def name(*words):
        return stage_spec(config(*words), 2).fingerprint("corpus", "teacher", "previous")

    plain = name()
    assert name("rollout.cache_epochs=9") == plain
    assert name("train.on_policy_from=0.1") == plain
    assert name("train.workers=1", "rollout.actors=2") == plain
    assert name("train.lr=1") != plain
    assert name("rollout.cache=true") != plain
    assert name("seed=1") != plain


def test_a_given_teacher_is_named_by_its_files_and_not_by_training_settings(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    given = teacher_spec(config(f"teacher.path={tmp_path}"))
    assert given.train is None
    assert teacher_spec(config(f"teacher.path={tmp_path}", "teacher.train.lr=1")).fingerprint("c") == given.fingerprint(
        "c"
    )
    before = given.fingerprint("c")
    (tmp_path / "config.json").write_text('{"hidden_size": 1}')
    assert given.fingerprint("c") != before
    for name in ("model.safetensors", "pytorch_model.bin", "generation_config.json"):
        before = given.fingerprint("c")
        (tmp_path / name).write_bytes(b"one")
        changed = given.fingerprint("c")
        (tmp_path / name).write_bytes(b"two")
        assert len({before, changed, given.fingerprint("c")}) == 3
    assert teacher_spec(config("teacher.train.lr=1")).fingerprint("c") != teacher_spec(config()).fingerprint("c")


def test_a_teacher_that_is_touched_or_copied_keeps_its_name(tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("config.json", "model.safetensors", "model.gguf"):
        (tmp_path / "a" / name).write_text("{}")
    first, gguf = model_digest(str(tmp_path / "a")), model_digest(str(tmp_path / "a"), "model.gguf")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    os.utime(tmp_path / "a" / "model.safetensors", (1, 1))
    assert model_digest(str(tmp_path / "a")) == model_digest(str(tmp_path / "b")) == first
    assert model_digest(str(tmp_path / "b"), "model.gguf") == gguf
    (tmp_path / "b" / "model.gguf").write_text("[]")  # as many bytes
    assert model_digest(str(tmp_path / "b"), "model.gguf") != gguf


def test_the_evaluation_is_named_by_the_stage_and_by_what_is_measured():
    section = config().eval
    name = evaluation_fingerprint("stage", section)
    assert evaluation_fingerprint("other", section) != name
    assert evaluation_fingerprint("stage", config("eval.blocks=9").eval) != name
    assert evaluation_fingerprint("stage", config("eval.new_tokens=9").eval) == name


def test_a_given_teacher_brings_its_tokenizer_unless_another_one_is_named():
    assert corpus_spec(config()).given_tokenizer is None
    given = corpus_spec(config("teacher.path=model", "teacher.gguf_file=w.gguf"))
    assert (given.given_tokenizer, given.gguf_file) == ("model", "w.gguf")
    named = corpus_spec(config("teacher.path=model", "teacher.gguf_file=w.gguf", "tokenizer.path=other"))
    assert (named.given_tokenizer, named.gguf_file) == ("other", None)


def test_corpora_are_kept_beside_the_run_directory(tmp_path):
    assert corpus_spec(config(f"output_dir={tmp_path}/runs/a")).cache == tmp_path / "runs" / "data"
    assert corpus_spec(config(f"data.cache_dir={tmp_path}/c")).cache == tmp_path / "c"
