import json
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from kforcing.distillation.text import TextBatch
from pipelines.benchmarks import text_recipes
from pipelines.benchmarks.text_recipes import Arm, batches_of, describe, read_arguments
from pipelines.config.section import ConfigError
from tests.models import VOCAB, make_backbone

SMALL = "train.steps=3 train.batch=2 train.micro_batch=1 train.sampled_tokens=0 student.k=2"


def test_an_arm_changes_the_recipe_by_name():
    arm = Arm.read("fast train.lr=5e-3 student.k=3")
    assert (arm.name, arm.stage().train.lr, arm.stage().k) == ("fast", 5e-3, 3)
    assert arm.stage().train.muon_lr == Arm.read("base").stage().train.muon_lr


def test_an_unknown_field_of_an_arm_is_refused():
    with pytest.raises(ConfigError, match=r"train\.speed"):
        Arm.read("wrong train.speed=3").stage()
    with pytest.raises(ConfigError, match=r"data\.block has no effect here"):
        Arm.read("idle data.block=64").stage()


def test_batches_are_the_rows_of_an_epoch_in_an_order_of_its_own():
    rows = torch.arange(6)[:, None].expand(-1, 12).contiguous()
    spec = Arm.read(f"tiny {SMALL}").stage()
    batches = batches_of(rows, spec, torch.device("cpu"))
    epochs = [[batch.tokens_BN[0, 0].item() for step in range(3) for batch in batches(step + 3 * e, 9)] for e in (0, 1)]
    assert all(sorted(epoch) == list(range(6)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    first: TextBatch = batches(0, 9)[0]
    assert first.anchors_BW.tolist() == [list(range(10))]
    assert first.noise_BWK.shape == (1, 10, 2)
    assert torch.equal(first.noise_BWK, batches(0, 9)[0].noise_BWK)


@pytest.mark.long
def test_an_arm_is_trained_measured_and_kept(tmp_path):
    make_backbone().save_pretrained(tmp_path / "teacher")
    tokens = np.random.default_rng(0).integers(0, VOCAB, 400).astype(np.int32)
    np.save(tmp_path / "tokens.npy", tokens)
    (tmp_path / "prompts.json").write_text(json.dumps([tokens[:8].tolist(), tokens[20:28].tolist()]))
    words = ["--output", str(tmp_path), "--block", "16", "--prompt-tokens", "8", "--new-tokens", "6", "--save"]
    design = "student.design.sequential"
    arm = Arm.read(f"tiny {SMALL} {design}.draft_rank=4 {design}.shortlist=4")
    result = text_recipes.run_arm(read_arguments(words), arm)
    assert result["steps"] == 3
    assert result["windows"] == 3 * 2 * 14
    assert set(result["tokens_a_step"]) == {"1", "0.7", "0"}
    assert all(1 <= value <= 2 for value in result["tokens_a_step"].values())
    assert [point["step"] for point in result["curve"]] == [1, 2, 3]
    assert (tmp_path / "tiny" / "model.safetensors").is_file()
    assert "| tiny |" in describe([result])


@pytest.mark.long
def test_arms_run_in_processes_of_their_own(tmp_path, monkeypatch, capsys):
    make_backbone().save_pretrained(tmp_path / "teacher")
    np.save(tmp_path / "tokens.npy", np.arange(400, dtype=np.int32) % VOCAB)
    (tmp_path / "prompts.json").write_text(json.dumps([list(range(8))]))
    words = ["text_recipes", "--prepared", "--output", str(tmp_path), "--block", "16", "--prompt-tokens", "8"]
    design = "student.design.sequential"
    arms = ["--arm", f"a {SMALL} {design}.draft_rank=0 {design}.shortlist=0", "--arm", f"b {SMALL} train.batch=100"]
    monkeypatch.setattr(sys, "argv", [*words, "--new-tokens", "4", *arms])
    text_recipes.main()
    assert [r["arm"] for r in json.loads((tmp_path / "arms.json").read_text())] == ["a"]
    assert "blocks of text are fewer than train.batch=100" in (tmp_path / "b" / "log.txt").read_text()
    assert "arm b failed" in capsys.readouterr().err


def test_tokens_of_a_corpus_are_taken_as_they_are(tmp_path):
    pq.write_table(pa.table({"tokens": [[1, 2], [3]]}), tmp_path / "c.parquet")
    tokenizer = type("Tokenizer", (), {"eos_token_id": 0})()
    assert list(text_recipes.documents(str(tmp_path / "c.parquet"), tokenizer)) == [[1, 2, 0], [3, 0]]
