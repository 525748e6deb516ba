"""A stage sets the low-rank head of its student from the rows of its store, whoever trains it."""

import numpy as np
import torch

from kforcing import PushForwardLM
from pipelines.config.overrides import apply
from pipelines.config.recipes import recipe
from pipelines.config.stages import resolve
from pipelines.data.rows import token_rows
from pipelines.data.token_store import write_manifest, write_shard
from pipelines.training.job import fit_candidates, stage_job
from pipelines.training.single_process import LocalStudent
from tests.models import VOCAB, make_backbone, make_sequential

RANK = 16  # the width of the tiny models: the head then gives all logits up to a constant


def stages():
    words = ["targets=text", "loss=kl", "student.k=3", "rollout.windows=5", "train.batch=2", "train.micro_batch=1"]
    words += [f"student.design.sequential.{name}" for name in ("hint_layers=1", f"draft_rank={RANK}", "shortlist=4")]
    return resolve(apply(recipe("smoke"), {}, words))


def store_of(folder):
    folder.mkdir()
    tokens = np.random.default_rng(0).integers(0, VOCAB, (64, 20)).astype(np.int32)
    shard = write_shard(folder, "shard", token_rows(np.arange(64), np.arange(64), tokens))
    write_manifest(folder, [shard])
    return folder


def error_of(student):
    """Largest error of the low-rank head on states of the trunk, up to a constant a row."""
    states = student.backbone.base_model(torch.arange(20)[None]).last_hidden_state[0]
    error = student.readout.candidates(states) - student.backbone.get_output_embeddings()(states)
    return (error - error.mean(dim=-1, keepdim=True)).abs().max().item()


@torch.no_grad()
def test_the_head_is_fitted_to_the_states_of_the_student(tmp_path):
    (spec,) = stages()
    job = stage_job(spec, str(tmp_path / "k3"), str(store_of(tmp_path / "store")), "teacher", None)
    student = make_sequential(make_backbone(), 3, hint_layers=1, draft_rank=RANK, shortlist=4)
    assert error_of(student) > 1.0
    fit_candidates(job, student)
    assert error_of(student) < 0.05


def test_a_student_trained_in_one_process_has_a_fitted_head(tmp_path):
    make_backbone().save_pretrained(tmp_path / "teacher")
    store = store_of(tmp_path / "store")
    local = LocalStudent(stages(), str(tmp_path / "teacher"), str(store), str(tmp_path / "out"), "text")
    cost = local.stage(3, steps=2, budget=None, previous=None)
    assert cost["steps"] == 2
    with torch.no_grad():
        assert error_of(PushForwardLM.from_pretrained(tmp_path / "out" / "k3")) < 0.05
