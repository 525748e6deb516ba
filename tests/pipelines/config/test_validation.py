import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedTokenizerFast

from kforcing.families import tiny_copy
from pipelines.config.command_line import read_command_line
from pipelines.config.overrides import apply
from pipelines.config.recipes import recipe
from pipelines.config.section import ConfigError
from pipelines.runs.cluster import check_labels, preflight, work_of_run
from pipelines.runs.stages import claim
from tests.models import CONFIGS, make_backbone


def read(tmp_path, *words):
    return read_command_line("", ["--recipe", "smoke", f"output_dir={tmp_path}/run", *words])


def test_a_good_line_gives_a_config(tmp_path):
    assert read(tmp_path, "train.steps=8").train.steps == 8


def test_words_and_flags_may_be_mixed_and_ranges_set_in_any_order(tmp_path):
    words = [
        "train.steps=8",
        "--recipe",
        "smoke",
        "student.design.noise.temperature_min=1.2",
        f"output_dir={tmp_path}/run",
    ]
    config = read_command_line(
        "", [*words, "student.design.noise.temperature_max=1.5"], defaults=["train.lr=9", "train.steps=3"]
    )
    assert (config.recipe, config.train.steps, config.train.lr) == ("smoke", 8, 9.0)


def test_a_job_keeps_its_results_out_of_its_temporary_directory(monkeypatch, tmp_path):
    assert read_command_line("", ["--recipe", "smoke"]).root == Path.cwd() / "runs" / "smoke"
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert read_command_line("", ["--recipe", "smoke"]).root == Path.home() / "kforcing" / "runs" / "smoke"
    assert read_command_line("", ["--recipe", "smoke", f"output_dir={tmp_path}/x"]).root == tmp_path / "x"


def test_a_smaller_k_drops_the_recipes_exceptions_beyond_it(tmp_path):
    config = read_command_line("", ["--recipe", "paper", "student.k=2", f"output_dir={tmp_path}/run"])
    assert "k1" in config.stages
    assert "k4" not in config.stages


def test_a_config_file_names_its_recipe(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(f"recipe: smoke\noutput_dir: {tmp_path}/run\ntrain:\n  steps: 5\n")
    config = read_command_line("", ["--config", str(file), "train.lr=1"])
    assert (config.recipe, config.train.steps, config.train.lr) == ("smoke", 5, 1.0)
    with pytest.raises(ConfigError, match=r"gone\.yaml does not exist"):
        read_command_line("", ["--config", "gone.yaml"])


@pytest.fixture
def files(tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    pq.write_table(pa.table({"id": ["a"], "text": ["hello"]}), folder / "good.parquet")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), folder / "empty.parquet")
    (folder / "bad.jsonl").write_text("not json\n")
    (folder / "body.jsonl").write_text(json.dumps({"body": "x"}) + "\n")
    (folder / "blank.txt").write_text("\n\n")
    (folder / "list.jsonl").write_text('[{"text": "x"}]\n')
    (folder / "latin.txt").write_bytes(b"caf\xe9\n")
    (folder / "broken.parquet").write_bytes(b"PAR1 not really")
    (folder / "words.txt").write_text("some words\n")
    return folder


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.source={files}/none.parquet"], "no .parquet, .jsonl, .json or .txt file there"),
        (["data.source={files}"], "mixes file types"),
        (["data.source={files}/empty.parquet"], "holds no documents"),
        (["data.source={files}/blank.txt"], "holds no documents"),
        (["data.source={files}/bad.jsonl"], "bad.jsonl, line 1: no JSON"),
        (["data.source={files}/body.jsonl"], "data.text_column=text is not in .*its columns are body"),
        (["data.source={files}/good.parquet", "data.text_column=body"], "its columns are id, text"),
        (["data.source={files}/good.parquet", "data.id_column=key"], "data.id_column=key is not in"),
        (["data.source={files}/words.txt", "data.id_column=key"], "text files have no columns"),
        (["data.heldout_fraction=1.5"], "data.heldout_fraction=1.5 must be less than 1"),
        (["student.k=3"], "not reachable by doubling"),
        (["targets=both"], "targets=both: choose one of self, ar"),
        (["stages.k8.train.steps=3"], "this run has the stages k1, k2, k4"),
        (["stages.k1.train.steps=3"], "trains nothing; leave it out"),
        (["stages.k2.targets=both"], "targets=both"),
        (["train.zero_stage=4"], "choose one of 1, 2, 3"),
        (["train.workers=3"], "batch=8 cannot be dealt to 3 ZeRO workers"),
        (["train.workers=0"], "workers=0 must be positive"),
        (["train.precision=fp8"], "choose one of fp32, bf16"),
        (["train.ema=1.0"], "train.ema=1.0 must be less than 1"),
        (["train.steps=0"], "train.steps=0 must be positive"),
        (["train.lr=nan"], "train.lr=nan must be a finite number"),
        (["train.clip=-1"], "train.clip=-1.0 must be greater than or equal to 0"),
        (["train.beta1=1.5"], "train.beta1=1.5 must be less than 1"),
        (["teacher.layers=0"], "teacher.layers=0 must be positive"),
        (["teacher.train.eps=0"], "teacher.train.eps=0.0 must be positive"),
        (["seed=18446744073709551616"], "seed=18446744073709551616 must be less than"),
        (["stages.k2.train.lr=inf"], "stages.k2.train.lr=inf must be a finite number"),
        (["eval.cpus_per_actor=-1"], "eval.cpus_per_actor=-1.0 must be greater than or equal to 0"),
        (["rollout.windows=33"], "has 1 to 32 windows"),
        (["tokenizer.vocab_size=100"], "need 257"),
        (["teacher.heads=5"], "even multiple of teacher.heads=5"),
        (["teacher.max_positions=33"], "exceeds the teacher's 33 positions"),
        (["eval.prompt_tokens=40"], "exceeds data.block=32"),
        (["eval.new_tokens=600"], "exceeds the teacher's 512 positions"),
        (["teacher.path={files}"], "no causal LM there"),
        (["output_dir=s3://bucket"], "output_dir=s3://bucket is a whole bucket; give a folder in it"),
        (["output_dir=ftp://host/run"], "output_dir: ftp://host/run: ftp:// is not known"),
        (["data.cache_dir=s3://bucket/a?b"], "data.cache_dir: s3://bucket/a is no URI of a folder"),
        (["output_dir={files}"], "is not a run directory"),
        (["student.design.noise.max_cycles=0.00001"], "0 < min < max"),
        (["data.source={files}/list.jsonl"], "list.jsonl, line 1: one JSON object on each line is needed"),
        (["data.source={files}/latin.txt"], "latin.txt, line 1: byte 0xe9 at position 3 is no UTF-8"),
        (["data.source={files}/broken.parquet"], "broken.parquet cannot be read"),
        (["data.max_docs=0"], "data.max_docs=0 must be positive"),
        (["eval.windows=33"], "eval.windows=33: a block of data.block=32"),
        (["eval.prompts=0"], "eval.prompts=0 must be positive"),
        (["train.label=pool"], "must be written key=value"),
        (["student.design.coupling=gumble"], "coupling=gumble: choose one of inverse_cdf, gumbel"),
        (["student.design.readout=argmax"], "undo a random generator"),
        (["student.design.readout=argmax", "student.design.coupling=inverse_cdf"], "loss=soft with .*readout=argmax"),
        (["student.design.sequential.hints=some"], "hints=some: choose one of none, copy, adapter"),
        (["student.design.sequential.hint_layers=3"], "the teacher has 2 layers"),
        (["loss=medium"], "loss=medium: choose one of hard, soft, kl, tv, blend, length"),
        (["targets=text"], "targets=text with loss=soft: targets=text goes with loss=kl, tv, blend, length"),
        (["loss=kl"], "targets=ar with loss=kl"),
        (
            ["targets=text", "loss=kl", "student.design.sequential.freeze_trunk=false"],
            "labels from the AR model inside",
        ),
        (["targets=text", "loss=kl", "rollout.cache=true"], "rollout.cache=True needs rollouts"),
        (["targets=text", "loss=kl", "train.sampled_tokens=9", "train.zero_stage=3"], "reads rows of the LM head"),
        (["targets=text", "loss=kl", "rollout.windows=29"], "has 1 to 28 windows"),
        (["stages.k4.targets=text"], "stages.k4.targets=text: targets=text holds for a whole run"),
        (["train.sampled_tokens=-1"], "train.sampled_tokens=-1 must be greater than or equal to 0"),
        (["rollout.teacher_top_k=0"], "rollout.teacher_top_k=0 must be positive"),
        (
            ["rollout.teacher_top_k=none", "student.design.sequential.freeze_trunk=false"],
            "freeze_trunk=false trains away",
        ),
        (["targets=self"], "targets=self has no AR teacher"),
        (["train.on_policy_fraction=0.5"], "needs labels for windows no rollout actor has seen"),
        (["train.on_policy_fraction=2"], "train.on_policy_fraction=2.0 must be less than or equal to 1"),
        (["loss=hard", "student.design.noise.temperature_min=0.7"], "would teach a sequential student other"),
        (["rollout.teacher_top_k=none", "train.precision=bf16"], "labels from a rounded AR model"),
        (["student.design.sequential.side_weight=-1"], "side_weight=-1.0 must be at least 0"),
    ],
)
def test_bad_input_is_one_clear_error_before_any_cluster(tmp_path, files, words, message):
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, *(w.replace("{files}", str(files)) for w in words))


def test_a_run_directory_of_another_recipe_is_refused(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text('{"recipe": "quickstart"}')
    with pytest.raises(ConfigError, match="belongs to a run of recipe 'quickstart', not 'smoke'"):
        read(tmp_path)


def test_a_run_under_the_former_name_of_its_recipe_goes_on(tmp_path):
    (tmp_path / "run.json").write_text('{"recipe": "quickstart"}')
    claim(tmp_path, "toy")
    with pytest.raises(ConfigError, match="belongs to a run of recipe 'quickstart', not 'paper'"):
        claim(tmp_path, "paper")


def test_a_backbone_with_a_sliding_window_shorter_than_the_blocks_is_refused(tmp_path):
    sizes = {
        "vocab_size": 23,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    config = MistralConfig(**sizes, num_key_value_heads=1, sliding_window=32)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"exceeds the teacher's 32 positions .*its sliding window"):
        read(tmp_path, f"teacher.path={tmp_path / 'model'}")


def test_a_teacher_that_cannot_be_a_backbone_is_refused_before_anything_starts(tmp_path):
    tiny_copy(AutoConfig.for_model("qwen3_next")).save_pretrained(tmp_path / "model")
    with pytest.raises(
        ConfigError, match=r"\(qwen3_next\) cannot be a backbone: .*linear_attention.*Families that work are"
    ):
        read(tmp_path, f"teacher.path={tmp_path / 'model'}")
    config = LlamaConfig(**CONFIGS["llama"].to_dict(), quantization_config={"quant_method": "gptq", "bits": 4})
    config.save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"cannot be a backbone: its weights are quantised \(gptq\)"):
        read(tmp_path, f"teacher.path={tmp_path / 'model'}")


def test_a_long_rope_teacher_is_used_up_to_where_its_factors_switch(tmp_path):
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 2, "long_factor": [4.0] * 2}
    record = {**CONFIGS["llama"].to_dict(), "max_position_embeddings": 512}
    config = LlamaConfig(**{**record, "rope_parameters": {**rope, "original_max_position_embeddings": 35}})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"data.block=32 \+ student.k=4 exceeds the teacher's 35 positions .*switch"):
        read(tmp_path, f"teacher.path={tmp_path / 'model'}")


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path):
    folder = tmp_path / "model"
    make_backbone().save_pretrained(folder)
    with pytest.raises(ConfigError, match="no tokenizer in"):
        read(tmp_path, f"teacher.path={folder}")
    vocab = {f"t{i}": i for i in range(30)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="t1").save_pretrained(folder)
    with pytest.raises(ConfigError, match="its tokenizer has 30 tokens and its model 23"):
        read(tmp_path, f"teacher.path={folder}")


def test_preflight_says_which_pool_is_too_large():
    config = apply(recipe("smoke"), {}, ["train.cpus_per_worker=1"])
    with pytest.raises(ConfigError, match=r"needs 3\.5 CPUs \(2 for train\.workers=2 \+ 0\.5 for rollout\.actors=1"):
        preflight(work_of_run(config), {"CPU": 2.0}, "this machine")
    preflight(work_of_run(config), {"CPU": 4.0}, "this machine")
    with pytest.raises(ConfigError, match=r"evaluation needs 3 CPUs \(2 for eval\.actors=2"):
        preflight(work_of_run(apply(recipe("smoke"), {}, ["eval.actors=2"])), {"CPU": 2.0}, "this machine")
    gpu = apply(recipe("smoke"), {}, ["rollout.gpus_per_actor=1"])
    with pytest.raises(ConfigError, match=r"needs 1 GPUs .* has 0"):
        preflight(work_of_run(gpu), {"CPU": 8.0}, "the cluster")


def test_pools_must_fit_on_the_nodes_they_are_tied_to():
    nodes = [
        {"Labels": {"pool": "trainer"}, "Resources": {"CPU": 8.0, "GPU": 8.0}},
        {"Labels": {"pool": "teacher"}, "Resources": {"CPU": 8.0, "GPU": 1.0}},
        {"Labels": {}, "Resources": {"CPU": 64.0, "GPU": 8.0}},
    ]

    def check(*words):
        check_labels(work_of_run(apply(recipe("smoke"), {}, words)), nodes)

    tied = ["train.label=pool=trainer", "train.gpus_per_worker=4", "rollout.label=pool=teacher"]
    check(*tied, "rollout.gpus_per_actor=1")
    with pytest.raises(
        ConfigError, match=r"stage k1 needs 2 GPUs \(2 for rollout.actors=2\), the part with label pool=teacher has 1\."
    ):
        check(*tied, "rollout.gpus_per_actor=1", "rollout.actors=2")
    with pytest.raises(ConfigError, match=r"stage teacher needs 32 CPUs .*, the part with label pool=trainer has 8"):
        check("teacher.train.label=pool=trainer", "teacher.train.cpus_per_worker=16")
    with pytest.raises(
        ConfigError, match=r"stage k4, rollout.actors=1: no node of the cluster has the label pool=other"
    ):
        check("stages.k4.rollout.label=pool=other")


def test_text_has_no_rollout_actors_and_self_written_text_has_its_own():
    config = apply(recipe("smollm2"), {}, ["data.source=self"])
    work = work_of_run(config)
    assert list(work) == ["stage k4", "evaluation", "text"]
    assert list(work["stage k4"]) == ["train.workers=2", "1 reading task"]
    assert list(work["text"]) == ["self_text.actors=1"]
    preflight(work, {"CPU": 2.0, "GPU": 0.0}, "this machine")


def test_a_teacher_in_training_has_no_rollouts():
    work = work_of_run(recipe("lm1b"))
    assert not any("rollout" in pool for pool in work["stage teacher"])
    assert any("rollout" in pool for pool in work["stage k1"])
