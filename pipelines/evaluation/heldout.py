"""Fidelity of a finished student on held-out windows, and sample continuations for the report.

held-out blocks (Ray Data) ─► EvalActor pool (student and AR teacher) ─► sums by document ─► figures with intervals
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from kforcing.attention.windows import Windows
from kforcing.backbone import load_ar
from kforcing.device import pick_device
from kforcing.engine import Engine, EngineConfig, Request, SamplingParams
from kforcing.keys import derive_key
from kforcing.loading import load_tokenizer
from kforcing.metrics.fidelity import window_scores
from kforcing.metrics.intervals import over_clusters
from kforcing.modeling import PushForwardLM
from kforcing.noise import sample_anchors, window_noise
from kforcing.remote import address, fetch
from pipelines.config.schema import EvalConfig
from pipelines.data.rows import fixed_list, sequences_of, to_numpy, tokens_of
from pipelines.data.token_store import TokenStore
from pipelines.data.tokenise import Prepared
from pipelines.files import write_json
from pipelines.rollouts.plan import ReadChunk, StepPlan
from pipelines.runs.stages import Stage

FIGURES = ("match", "student_nll", "teacher_nll", "target_nll")


@dataclass(frozen=True)
class EvalJob:
    """A student to score, and what its actors need."""

    teacher: str
    student: str
    k: int
    windows: int
    seed: int
    batch: int


class EvalActor:
    """Scores held-out blocks: one output row for each block, with the sums over its windows."""

    def __init__(self, job: EvalJob):
        self.job, self.device = job, pick_device()
        self.teacher = load_ar(str(fetch(job.teacher))).to(self.device)
        self.student = PushForwardLM.from_pretrained(fetch(job.student)).to(self.device)

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Rows of tokens → for each block one row of sums."""
        return pa.concat_tables(
            [self._score(rows.slice(i, self.job.batch)) for i in range(0, len(rows), self.job.batch)]
        )

    def _score(self, rows: pa.Table) -> pa.Table:
        seq, tokens = sequences_of(rows), tokens_of(rows)
        anchors = sample_anchors(derive_key(self.job.seed, "eval", "anchors"), seq, tokens.shape[1], self.job.windows)
        noise = window_noise(derive_key(self.job.seed, "eval", "noise"), seq, anchors, self.job.k)
        temperature = torch.full((len(seq),), self.student.config.design.noise.clamp(1.0))
        windows = Windows(*(x.to(self.device) for x in (tokens, anchors, noise, temperature)))
        scores = window_scores(self.student, self.teacher, windows)
        columns = {name: fixed_list(getattr(scores, name).double().sum(1).cpu().numpy()) for name in FIGURES}
        block = scores.match.all(-1).double().sum(1).cpu().numpy()
        return pa.table({"doc": rows["doc"], "block_match": block, **columns})


def evaluate_student(stage: Stage, prepared: Prepared, job: EvalJob, config: EvalConfig) -> dict[str, Any]:
    """The figures of a student with 95% intervals: match and NLLs by offset, and block match.

    A finished stage is not scored again.
    """
    if stage.manifest:
        return stage.manifest["figures"]
    import ray.data

    store = TokenStore(prepared.split("heldout"), job.seed)
    blocks = min(config.blocks, store.rows_per_epoch)
    chunks = -(-blocks // job.batch)
    # The steps of this plan are batches of held-out rows. `limit` cuts the last batch to the wanted number of blocks.
    read = ReadChunk(address(store.folder), job.seed, StepPlan(job.batch, 1, chunks, 0, 1))
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    scored = (
        ray.data.range(chunks, override_num_blocks=chunks)
        .map_batches(read, batch_format="pyarrow", batch_size=1)
        .limit(blocks)
        .map_batches(
            EvalActor,
            fn_constructor_args=(job,),
            batch_format="pyarrow",
            batch_size=job.batch,
            num_cpus=config.cpus_per_actor,
            num_gpus=config.gpus_per_actor or None,
            compute=ray.data.ActorPoolStrategy(size=config.actors),
        )
    )
    table = pa.concat_tables(list(scored.iter_batches(batch_format="pyarrow", batch_size=None)))
    figures = summarise(table, job, config)
    stage.finish(figures=figures)
    return figures


def summarise(table: pa.Table, job: EvalJob, config: EvalConfig) -> dict[str, Any]:
    """Per-block sums → figures with intervals over documents."""
    columns = [table["block_match"].to_numpy()[:, None]] + [to_numpy(table[name]) for name in FIGURES]
    rows = np.concatenate(columns, axis=1)
    docs, counts = table["doc"].to_numpy(), np.full(len(rows), float(job.windows))
    found = over_clusters(rows, counts, docs, config.bootstrap, job.seed)
    assert found is not None, "no held-out blocks"
    intervals = [asdict(i) for i in found]
    by_name = {name: intervals[1 + i * job.k : 1 + (i + 1) * job.k] for i, name in enumerate(FIGURES)}
    return {
        **by_name,
        "block_match": intervals[0],
        "windows": int(counts.sum()),
        "documents": len(np.unique(docs)),
    }


@dataclass(frozen=True)
class SampleJob:
    """The models that continue held-out prompts for the report."""

    teacher: str
    students: dict[str, str]
    tokenizer: str
    heldout: str
    seed: int
    config: EvalConfig


def continue_prompts(job: SampleJob) -> list[dict[str, str]]:
    """Continuations of held-out prompts by teacher and students under the same noise; one record for each prompt."""
    tokenizer = load_tokenizer(fetch(job.tokenizer))
    store = TokenStore(job.heldout, job.seed)
    prompts = store.read(np.arange(job.config.prompts))
    device = pick_device()
    students = {name: PushForwardLM.from_pretrained(fetch(path)).to(device) for name, path in job.students.items()}
    design = next(iter(students.values())).config.design
    sampling = SamplingParams(temperature=design.noise.clamp(1.0))
    tokens = tokens_of(prompts)[:, : job.config.prompt_tokens].tolist()
    requests = [
        Request(row, job.config.new_tokens, seed=job.seed + i, sampling=sampling) for i, row in enumerate(tokens)
    ]
    engine_config = EngineConfig(
        max_num_seqs=len(requests), max_model_len=len(tokens[0]) + job.config.new_tokens, coupling=design.coupling
    )
    records = [{"prompt": str(tokenizer.decode(row))} for row in tokens]
    for name, model in {"teacher": load_ar(str(fetch(job.teacher))).to(device), **students}.items():
        for record, completion in zip(records, Engine(model, engine_config).generate(requests), strict=True):
            record[name] = str(tokenizer.decode(completion.tokens))
    return records


def write_samples(folder: Path, job: SampleJob) -> list[dict[str, str]]:
    """Run `continue_prompts` as a cluster task and keep the result as `samples.json`."""
    import ray

    task = ray.remote(num_cpus=job.config.cpus_per_actor, num_gpus=job.config.gpus_per_actor)(continue_prompts)
    records = ray.get(task.remote(job))
    write_json(folder / "samples.json", records)
    return records
