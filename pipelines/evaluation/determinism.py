"""How many tokens change with precision and batch shape, and whether fidelity does.

Whole texts are compared up to and with their first difference, while contexts are still equal: what changes there is the
precision's or the shape's own doing, and what changes later is its echo.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kforcing.attention.windows import Windows
from kforcing.backbone import load_ar
from kforcing.coupling import COUPLINGS
from kforcing.device import pick_device
from kforcing.distillation.teachers import ARTeacher
from kforcing.engine import Engine, EngineConfig, Request
from kforcing.metrics.free_run import free_run, same_so_far
from kforcing.modeling import PushForwardLM
from kforcing.noise import derive_key, sample_anchors, window_noise
from pipelines.evaluation.measure import Job, heldout, over_documents

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
SLOTS = (1, 4, 16)
PROMPTS = 32


class Bench:
    """One model of an evaluation, decoding the same requests in any precision and shape."""

    def __init__(self, job: Job):
        self.job, text = job, job.config.text
        self.prompts = heldout(job.subject, job.config, PROMPTS, text.prompt_tokens)
        self.requests = [
            Request(p, text.new_tokens, s)
            for p, s in zip(self.prompts.tokens_RN.tolist(), self.prompts.seeds, strict=True)
        ]
        self.max_model_len = text.prompt_tokens + text.new_tokens
        student = self.model("fp32")
        self.coupling = student.config.design.coupling if isinstance(student, PushForwardLM) else "inverse_cdf"

    def model(self, precision: str) -> Any:
        """The model, loaded anew."""
        job = self.job
        model = PushForwardLM.from_pretrained(job.student.path) if job.student else load_ar(job.subject.teacher)
        return model.to(pick_device(), PRECISIONS[precision])

    def engine(self, precision: str, slots: int, invariant: bool = False) -> Engine:
        """An engine of a shape."""
        config = EngineConfig(slots, self.max_model_len, self.job.k, coupling=self.coupling, batch_invariant=invariant)
        return Engine(self.model(precision), config)

    def texts(self, engine: Engine) -> Tensor:
        """(R, T) tokens of all requests, as many at once as there are slots."""
        return torch.tensor([done.tokens for done in engine.generate(self.requests)])

    def one_by_one(self, engine: Engine) -> Tensor:
        """The same, every request alone."""
        return torch.tensor([engine.generate([request])[0].tokens for request in self.requests])


def determinism(folder: Path, job: Job, given: Any) -> dict[str, Any]:
    """Flips between pairs of settings, and the match with the fp32 AR model in each setting."""
    bench = Bench(job)
    runs = {(p, n): bench.texts(bench.engine(p, n)) for p in PRECISIONS for n in SLOTS}
    invariant = bench.engine("bf16", max(SLOTS), invariant=True)
    pairs = {f"{p}: {SLOTS[0]} slot and {n}": (runs[p, SLOTS[0]], runs[p, n]) for p in PRECISIONS for n in SLOTS[1:]}
    pairs |= {
        "bf16, batch-invariant: alone and in company": (bench.one_by_one(invariant), bench.texts(invariant)),
        f"fp32 and bf16, {max(SLOTS)} slots": (runs["fp32", max(SLOTS)], runs["bf16", max(SLOTS)]),
    }
    return {
        "k": job.k,
        "flips": {name: flips(*pair) for name, pair in pairs.items()},
        "windows": _windows(bench),
        "match": [{"precision": p, "slots": n, **_match(bench, made)} for (p, n), made in runs.items()],
    }


def flips(one_RT: Tensor, other_RT: Tensor) -> dict[str, float]:
    """Share of texts that differ, and of tokens that do while the texts before them are equal."""
    same = same_so_far(one_RT, other_RT)
    changed = (~same.all(1)).sum().item()
    return {"texts": changed / len(same), "tokens": changed / (same.sum().item() + changed)}


def _match(bench: Bench, made_RT: Tensor) -> dict[str, Any]:
    """Share of tokens that the fp32 AR model makes of the same noise after the same text."""
    prompts = bench.prompts
    coupling = COUPLINGS[bench.coupling]
    teacher = load_ar(bench.job.subject.teacher).to(pick_device())
    match = free_run(teacher, prompts.tokens_RN, made_RT.to(pick_device()), prompts.seeds, coupling).match
    sums = match.double().mean(1).cpu().numpy()
    (figure,) = over_documents(sums[:, None], 1.0 + 0 * sums, prompts.doc_R, bench.job.config)
    assert figure is not None
    return figure


@torch.inference_mode()
def _windows(bench: Bench) -> dict[str, float]:
    """Share of tokens that bf16 changes on the same held-out contexts and noise, by one pass of a block."""
    job = bench.job
    rows = heldout(job.subject, job.config, PROMPTS, job.subject.config.data.block)
    seq = torch.arange(len(rows.seeds))
    count = min(16, rows.tokens_RN.shape[1])
    anchors = sample_anchors(derive_key(job.config.seed, "flips"), seq, rows.tokens_RN.shape[1], count)
    noise = window_noise(derive_key(job.config.seed, "flip noise"), seq, anchors, job.k)
    windows = Windows(*(x.to(pick_device()) for x in (rows.tokens_RN, anchors, noise, torch.ones(len(seq)))))
    made = []
    for precision in PRECISIONS:
        model = bench.model(precision)
        coupling = COUPLINGS[bench.coupling]
        made.append(model.draw(windows).tokens_BWK if job.student else ARTeacher(model, coupling).rollout(windows))
    changed = (made[0] != made[1]).double()
    return {"bf16": changed.mean().item(), "bf16_first": changed[..., 0].mean().item()}
