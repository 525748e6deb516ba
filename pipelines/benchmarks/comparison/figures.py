"""Figures of a student on held-out documents: fidelity under the same noise, and the joint distribution."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kforcing.attention.reader import ar_block_logits
from kforcing.attention.windows import Windows, read_context
from kforcing.backbone import load_ar
from kforcing.coupling import COUPLINGS
from kforcing.distillation.losses import SoftTargets, soft_target_kl
from kforcing.distillation.teachers import ARTeacher
from kforcing.keys import derive_key
from kforcing.metrics.joint import independent, joint_tv, position_entropy, sample_blocks
from kforcing.modeling import PushForwardLM
from kforcing.noise import sample_anchors, window_noise
from pipelines.benchmarks.comparison.variants import TrainingJob
from pipelines.data.rows import sequences_of, tokens_of
from pipelines.data.token_store import TokenStore
from pipelines.files import atomic_file

BUCKETS = {2: 24, 4: 6, 8: 2}


CONTEXTS = 10


def heldout_windows(job: TrainingJob, k: int, blocks: int = 64, windows: int = 16) -> list[Windows]:
    """Held-out windows with noise, the same for every variant and seed."""
    store = TokenStore(job.heldout, 0)
    rows = store.read(np.arange(blocks))
    seq = sequences_of(rows)
    tokens = tokens_of(rows)
    anchors = sample_anchors(derive_key(0, "compare", "anchors"), seq, tokens.shape[1], windows)
    noise = window_noise(derive_key(0, "compare", "noise"), seq, anchors, k)
    whole = Windows(tokens, anchors, noise, torch.ones(len(seq)))
    return [whole.rows(torch.arange(i, i + 16)) for i in range(0, blocks, 16)]


@torch.inference_mode()
def conditional_figures(model: PushForwardLM, teacher: Any, job: TrainingJob, k: int) -> dict[str, Any]:
    """KL and target NLL by offset along the teacher's tokens; match under each coupling; what a shortlist loses."""
    design = model.config.design
    names = list(COUPLINGS) if design.conditional else [design.coupling]
    kl, nll, tail = [], [], []
    match: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    for windows in heldout_windows(job, k):
        context = read_context(teacher, windows.context_BN)
        for name in names:
            theirs = ARTeacher(teacher, COUPLINGS[name]).rollout(windows)
            if design.conditional:
                model.readout.coupling = COUPLINGS[name]
            drawn = model.draw(windows)
            match[name].append((drawn.tokens_BWK == theirs).flatten(0, 1))
        logp = ar_block_logits(teacher, context, windows.anchors_BW, theirs).log_softmax(-1)
        scores = model.scores(windows, theirs)
        nll.append(-scores.logits_BWKV.log_softmax(-1).gather(-1, theirs[..., None])[..., 0].flatten(0, 1))
        if design.conditional:
            kl.append(soft_target_kl(scores.logits_BWKV, SoftTargets(logp)).flatten(0, 1))
        if design.conditional and design.sequential.shortlist:
            best = scores.side[-1].topk(min(design.sequential.shortlist, logp.shape[-1]), dim=-1).indices
            tail.append(1 - logp[:, :, 1:].exp().gather(-1, best).sum(-1).flatten(0, 1))
    if design.conditional:
        model.readout.coupling = COUPLINGS[design.coupling]
    hits = {name: torch.cat(parts).float() for name, parts in match.items()}
    figures: dict[str, Any] = {
        "target_nll": torch.cat(nll).mean(0).tolist(),
        "match": {name: hit.mean(0).tolist() for name, hit in hits.items()},
        "block_match": {name: hit.prod(1).mean().item() for name, hit in hits.items()},
    }
    if kl:
        figures["kl"] = torch.cat(kl).mean(0).tolist()
    if tail:
        figures["shortlist_tail"] = torch.cat(tail).mean(0).tolist()
    return figures


def joint_contexts(job: TrainingJob) -> torch.Tensor:
    """Held-out contexts whose next tokens are sampled, (CONTEXTS, N): the same for every variant."""
    rows = TokenStore(job.heldout, 0).read(np.arange(CONTEXTS) + 1000)
    return tokens_of(rows)


def teacher_samples(job: TrainingJob) -> list[dict[str, torch.Tensor]]:
    """For each context two samples of the teacher's next tokens; made once and kept."""
    file = Path(job.references)
    if not file.is_file():
        torch.set_num_threads(1)
        teacher = ARTeacher(load_ar(job.teacher), COUPLINGS["inverse_cdf"])
        keys = {name: derive_key(0, "compare", name) for name in ("one", "two")}
        longest = max(BUCKETS)
        made = [
            {name: sample_blocks(teacher.rollout, context, longest, job.samples, key) for name, key in keys.items()}
            for context in joint_contexts(job)
        ]
        with atomic_file(file) as partial:
            torch.save(made, partial)
    return torch.load(file, weights_only=True)


@torch.inference_mode()
def joint_figures(model: PushForwardLM, job: TrainingJob, k: int) -> dict[str, Any]:
    """Joint total variation and entropy on fixed contexts, with floor, independent line and the teacher's entropy."""
    figures: dict[str, list[float]] = {n: [] for n in ("tv", "floor", "independent", "entropy", "teacher_entropy")}
    key = derive_key(job.seed, "compare", "student")
    for context, teacher in zip(joint_contexts(job), teacher_samples(job), strict=True):
        one, two = teacher["one"][:, :k], teacher["two"][:, :k]
        mine = sample_blocks(lambda w: model.draw(w).tokens_BWK, context, k, job.samples, key)
        figures["tv"].append(joint_tv(mine, one, BUCKETS[k]))
        figures["floor"].append(joint_tv(two, one, BUCKETS[k]))
        figures["independent"].append(joint_tv(independent(two, 0), one, BUCKETS[k]))
        figures["entropy"].append(position_entropy(mine))
        figures["teacher_entropy"].append(position_entropy(one))
    return {name: statistics.mean(values) for name, values in figures.items()}
