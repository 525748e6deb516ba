"""How many tokens change with precision and batch shape, and whether fidelity changes with them.

Texts are compared up to and including their first difference. Until there both decoders have read the same context, so the
difference is the effect of the precision or the shape; later differences follow from the first one.
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
from kforcing.keys import derive_key
from kforcing.metrics.free_run import free_run, same_so_far
from kforcing.modeling import PushForwardLM
from kforcing.noise import sample_anchors, window_noise
from pipelines.evaluation.measure.measurement import Measurement
from pipelines.evaluation.measure.prompts import heldout

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
SLOTS = (1, 4, 16)
PROMPTS = 32


class RepeatedDecoding:
    """One model of an evaluation that decodes the same requests in any precision and batch shape."""

    def __init__(self, measurement: Measurement):
        self.measurement, text = measurement, measurement.config.text
        self.prompts = heldout(measurement, PROMPTS, text.prompt_tokens)
        self.requests = [
            Request(p, text.new_tokens, s)
            for p, s in zip(self.prompts.tokens_RN.tolist(), self.prompts.seeds, strict=True)
        ]
        self.max_model_len = text.prompt_tokens + text.new_tokens
        student = self.model("fp32")
        self.coupling = student.config.design.coupling if isinstance(student, PushForwardLM) else "inverse_cdf"

    def model(self, precision: str) -> Any:
        """The model, loaded again in a precision."""
        student, teacher = self.measurement.student, self.measurement.subject.teacher
        model = PushForwardLM.from_pretrained(student.path) if student else load_ar(teacher)
        return model.to(pick_device(), PRECISIONS[precision])

    def engine(self, precision: str, slots: int, invariant: bool = False) -> Engine:
        """An engine with so many slots."""
        k = self.measurement.k
        config = EngineConfig(slots, self.max_model_len, k, coupling=self.coupling, batch_invariant=invariant)
        return Engine(self.model(precision), config)

    def texts(self, engine: Engine) -> Tensor:
        """(R, T) tokens of all requests, decoded together as far as the engine has slots."""
        return torch.tensor([done.tokens for done in engine.generate(self.requests)])

    def one_by_one(self, engine: Engine) -> Tensor:
        """(R, T) tokens of all requests, each decoded alone."""
        return torch.tensor([engine.generate([request])[0].tokens for request in self.requests])


def determinism(folder: Path, measurement: Measurement, given: Any) -> dict[str, Any]:
    """Tokens that flip between pairs of settings, and the match with the fp32 AR model in each setting."""
    decoding = RepeatedDecoding(measurement)
    runs = {(p, n): decoding.texts(decoding.engine(p, n)) for p in PRECISIONS for n in SLOTS}
    invariant = decoding.engine("bf16", max(SLOTS), invariant=True)
    pairs = {f"{p}: {SLOTS[0]} slot and {n}": (runs[p, SLOTS[0]], runs[p, n]) for p in PRECISIONS for n in SLOTS[1:]}
    pairs |= {
        "bf16, batch-invariant: alone and in company": (decoding.one_by_one(invariant), decoding.texts(invariant)),
        f"fp32 and bf16, {max(SLOTS)} slots": (runs["fp32", max(SLOTS)], runs["bf16", max(SLOTS)]),
    }
    return {
        "k": measurement.k,
        "flips": {name: flips(*pair) for name, pair in pairs.items()},
        "windows": _windows(decoding),
        "match": [{"precision": p, "slots": n, **_match(decoding, made)} for (p, n), made in runs.items()],
    }


def flips(one_RT: Tensor, other_RT: Tensor) -> dict[str, float]:
    """Share of texts that differ, and share of tokens that differ while the texts before them are equal."""
    same = same_so_far(one_RT, other_RT)
    changed = (~same.all(1)).sum().item()
    return {"texts": changed / len(same), "tokens": changed / (same.sum().item() + changed)}


def _match(decoding: RepeatedDecoding, made_RT: Tensor) -> dict[str, Any]:
    """Share of tokens that equal the fp32 AR model's token under the same noise and after the same text."""
    prompts, measurement = decoding.prompts, decoding.measurement
    teacher = load_ar(measurement.subject.teacher).to(pick_device())
    coupling = COUPLINGS[decoding.coupling]
    match = free_run(teacher, prompts.tokens_RN, made_RT.to(pick_device()), prompts.seeds, coupling).match
    sums = match.double().mean(1).cpu().numpy()
    (figure,) = measurement.over_documents(sums[:, None], 1.0 + 0 * sums, prompts.doc_R)
    assert figure is not None
    return figure


@torch.inference_mode()
def _windows(decoding: RepeatedDecoding) -> dict[str, float]:
    """Share of tokens that bf16 changes in held-out windows: one pass of a block, same contexts, same noise."""
    measurement = decoding.measurement
    rows = heldout(measurement, PROMPTS, measurement.subject.run.corpus.data.block)
    seq, length = torch.arange(len(rows.seeds)), rows.tokens_RN.shape[1]
    anchors = sample_anchors(derive_key(measurement.config.seed, "flips"), seq, length, min(16, length))
    noise = window_noise(derive_key(measurement.config.seed, "flip noise"), seq, anchors, measurement.k)
    windows = Windows(*(x.to(pick_device()) for x in (rows.tokens_RN, anchors, noise, torch.ones(len(seq)))))
    made, coupling = [], COUPLINGS[decoding.coupling]
    for precision in PRECISIONS:
        model = decoding.model(precision)
        student = measurement.student
        made.append(model.draw(windows).tokens_BWK if student else ARTeacher(model, coupling).rollout(windows))
    changed = (made[0] != made[1]).double()
    return {"bf16": changed.mean().item(), "bf16_first": changed[..., 0].mean().item()}
