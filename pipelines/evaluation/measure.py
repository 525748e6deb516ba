"""What each part measures: functions of (folder, job, results of other parts) that return JSON.

Texts are made under noise that depends on seed and position alone, so every decoder continues the same prompts under the
same noise and can be compared with the AR model token by token.
"""

from __future__ import annotations

import itertools
import json
import platform
import re
import statistics
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kforcing.backbone import head, load_ar
from kforcing.baselines.rows import Decoder
from kforcing.coupling import COUPLINGS
from kforcing.device import pick_device
from kforcing.distillation.teachers import ARTeacher
from kforcing.engine import Engine, EngineConfig, Request
from kforcing.metrics.diversity import diversity
from kforcing.metrics.flops import attention_step, measured_step, predicted_ar_step
from kforcing.metrics.free_run import free_run, same_so_far
from kforcing.metrics.gen_ppl import gen_ppl, load_external
from kforcing.metrics.intervals import over_clusters
from kforcing.metrics.joint import (
    ar_score,
    divergence,
    enumerable,
    independent,
    joint_tv,
    position_entropy,
    sample_blocks,
    student_score,
)
from kforcing.metrics.mauve import features, mauve
from kforcing.modeling import PushForwardLM
from kforcing.noise import derive_key
from pipelines.config.stages import resolve
from pipelines.data.rows import documents_of, tokens_of
from pipelines.data.token_store import TokenStore
from pipelines.data.tokenise import eos_id, load_tokenizer
from pipelines.evaluation.baselines import EngineDecoder, Row, decoder_of, noise_of
from pipelines.evaluation.config import EvaluationConfig
from pipelines.evaluation.judge import JudgeConfig, Pair, judge
from pipelines.evaluation.subject import Student, Subject
from pipelines.rollouts.plan import StepPlan
from pipelines.training.single_process import LocalStudent, count_step
from pipelines.training.step import ARStep, TokenBatch

Figure = dict[str, Any]
"""`value`, and the ends `lo` and `hi` of its 95% interval, None where there is one document only."""
BLOCK = 4
"""Tokens of the joint distribution by which rivals are compared."""
ROWS_AT_ONCE = 512
SPREAD = 8
"""Rows that are looked at for each prompt."""
BINS = 8


@dataclass(frozen=True)
class Job:
    """Models, settings, and which of them a part is about."""

    subject: Subject
    config: EvaluationConfig
    row: Row | None = None
    student: Student | None = None
    k: int = 0
    rows: tuple[str, ...] = ()
    """Names of rows, for parts about several."""


@dataclass(frozen=True)
class Prompts:
    """Beginnings of held-out blocks."""

    tokens_RN: Tensor
    doc_R: np.ndarray
    """Document of each, what intervals are bootstrapped over."""
    seeds: list[int]


def heldout(subject: Subject, config: EvaluationConfig, count: int, tokens: int, first: int = 0) -> Prompts:
    """Prompts from the `SPREAD · count` rows of the held-out store behind `first`, each of another document as far as there
    are so many, and with noise of its own."""
    store = TokenStore(subject.heldout, config.seed)
    rows = store.read(np.arange(first, first + SPREAD * count) % store.rows_per_epoch)
    seen: Counter[int] = Counter()
    turns = []  # a row's number within its document
    for doc in documents_of(rows).tolist():
        turns.append(seen[doc])
        seen[doc] += 1
    rows = rows.take(np.argsort(turns, kind="stable")[:count])
    ids = tokens_of(rows)[:, :tokens]
    seeds = [derive_key(config.seed, "prompt", first + i) % 2**31 for i in range(count)]
    return Prompts(ids.to(pick_device()), documents_of(rows), seeds)


def over_documents(
    sums: np.ndarray, counts: np.ndarray, doc_R: np.ndarray, config: EvaluationConfig
) -> list[Figure | None]:
    """(R, M) sums and (R,) counts of texts → M figures with intervals over their documents, none when nothing counts."""
    found = over_clusters(sums, counts, doc_R, config.bootstrap, config.seed)
    return [asdict(i) for i in found] if found else [None] * sums.shape[1]


def teacher_nll(teacher: Any, prompts_RN: Tensor, made: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Σ −log p of each text under the AR model, and its tokens."""
    N, longest = prompts_RN.shape[1], max(map(len, made))
    sums, counts = np.zeros(len(made)), np.array([len(text) for text in made], dtype=float)
    rows_of_ids = [text + [0] * (longest - len(text)) for text in made]
    padded = torch.tensor(rows_of_ids, dtype=torch.int64, device=prompts_RN.device)
    with torch.inference_mode():
        for rows in torch.arange(len(made)).split(32):
            whole = torch.cat([prompts_RN[rows], padded[rows]], dim=1)
            logp = teacher(input_ids=whole[:, :-1], use_cache=False).logits[:, N - 1 :].float().log_softmax(-1)
            nll = -logp.gather(-1, padded[rows][..., None])[..., 0].double().cpu().numpy()
            sums[rows] = (nll * (np.arange(longest) < counts[rows][:, None])).sum(1)
    return sums, counts


def text_figures(job: Job, prompts: Prompts, made: list[list[int]], teacher: Any) -> dict[str, Any]:
    """Two-sided NLL and diversity of continuations."""
    nll, counts = teacher_nll(teacher, prompts.tokens_RN, made)
    varied = diversity(made)
    intervals = varied.intervals(job.config.bootstrap, job.config.seed, prompts.doc_R)
    return {
        "nll": over_documents(nll[:, None], counts, prompts.doc_R, job.config)[0],
        **{name: asdict(figure) if figure else None for name, figure in intervals.items()},
        "distinct": {str(n): share for n, share in varied.distinct.items()},
    }


def cut(tokens_RT: Tensor, job: Job) -> list[list[int]]:
    """Texts up to their first EOS, when the protocol wants it."""
    rows = tokens_RT.tolist()
    if not job.config.text.cut_at_eos:
        return rows
    eos = eos_id(load_tokenizer(job.subject.tokenizer))
    return [row[: row.index(eos)] if eos in row else row for row in rows]


def cost(folder: Path, job: Job, given: Any) -> dict[str, Any]:
    """FLOPs of the run's training, counted on one real step of each stage; a decoding step's, measured."""
    subject, config = job.subject, job.subject.config
    stages = []
    if config.teacher.path is None:
        stages.append(_teacher_cost(subject))
    specs = resolve(config)
    local, previous = LocalStudent(specs, subject.teacher, subject.train, str(folder), "count"), None
    have = {student.k: Path(student.path) for student in subject.students}
    for stage in specs:
        k = stage.k
        if stage.learns:
            flops, steps = local.count(k, previous), stage.train.steps
            times = 1 / stage.rollout.cache_epochs if stage.rollout.cache else 1.0  # cached rollouts are made once
            rollouts, train = steps * flops.batch * times, steps * flops.train
            stages.append({"name": f"k{k}", "k": k, "steps": steps, "rollouts": rollouts, "train": train})
        # A stage whose student is not here (a registered model has its last alone) costs what an untrained one does.
        previous = have[k] if k in have else local.untrained(k, previous)
    of_students = [s for s in stages if s["name"] != "teacher"]
    context = config.data.block - subject.last.k
    backbone = load_ar(subject.teacher)
    ar = predicted_ar_step(backbone).flops + attention_step(backbone, 1, context).flops
    decoding = [{"name": "AR", "k": 1, "flops_a_token": ar}]
    for student, k in subject.pairs:
        model = PushForwardLM.from_pretrained(student.path)
        decoding.append({"name": student.name, "k": k, "flops_a_token": measured_step(model, k, context).flops / k})
    total = sum(s["rollouts"] + s["train"] for s in of_students)
    return {"stages": stages, "flops": total, "decoding": decoding}


def _teacher_cost(subject: Subject) -> dict[str, Any]:
    train = subject.config.teacher.train
    store = TokenStore(subject.train, subject.config.seed)

    def micro(step: int, steps: int) -> list[TokenBatch]:
        rows = store.read(StepPlan(train.micro_batch, 1, 1, 0, 1).positions(0))
        return [TokenBatch(tokens_of(rows, pick_device()))]

    flops = count_step(ARStep(load_ar(subject.teacher)), micro).train * train.batch / train.micro_batch
    return {"name": "teacher", "k": 0, "steps": train.steps, "rollouts": 0.0, "train": train.steps * flops}


def references(folder: Path, job: Job, given: Any) -> dict[str, Any]:
    """The AR model's texts under each coupling, further texts of each prompt, and its next tokens after fixed contexts."""
    text, teacher = job.config.text, load_ar(job.subject.teacher).to(pick_device())
    prompts = heldout(job.subject, job.config, text.prompts, text.prompt_tokens)
    decoders = {name: EngineDecoder(teacher, 1, name) for name in COUPLINGS}
    texts = {n: d.decode(prompts.tokens_RN, text.new_tokens, prompts.seeds).tokens_RT for n, d in decoders.items()}
    decoder, again = decoders["inverse_cdf"], []
    for i in range(max(1, text.mauve_seeds)):
        others = [seed + 1 + i for seed in prompts.seeds]
        again.append(decoder.decode(prompts.tokens_RN, text.new_tokens, others).tokens_RT)
    blocks = {name: next_blocks(job, decoder, name).numpy() for name in ("one", "two")}
    np.savez(folder / "blocks.npz", one=blocks["one"], two=blocks["two"])
    tokenizer = load_tokenizer(job.subject.tokenizer)
    joint = joint_of(job, torch.from_numpy(blocks["two"]), blocks["one"])
    apart = torch.stack([independent(torch.from_numpy(b), 0) for b in blocks["two"]])
    return {
        "prompts": [str(tokenizer.decode(p)) for p in prompts.tokens_RN.tolist()],
        "texts": {name: tokens.tolist() for name, tokens in texts.items()},
        "again": [tokens.tolist() for tokens in again],
        "joint": joint,
        "joint_independent": joint_of(job, apart, blocks["one"], joint["by_context"]),
        **text_figures(job, prompts, cut(again[0], job), teacher),
    }


def next_blocks(job: Job, decoder: Decoder, stream: str) -> Tensor:
    """(contexts, samples, BLOCK) tokens that a decoder makes after fixed prompts, each from noise of its own."""
    fidelity, text = job.config.fidelity, job.config.text
    prompts = heldout(job.subject, job.config, fidelity.contexts, text.prompt_tokens, first=1000)
    blocks = []
    for c, context_N in enumerate(prompts.tokens_RN):
        seeds = [derive_key(job.config.seed, "blocks", stream, c, i) % 2**31 for i in range(fidelity.samples)]
        for some in [seeds[i : i + ROWS_AT_ONCE] for i in range(0, len(seeds), ROWS_AT_ONCE)]:
            blocks.append(decoder.decode(context_N.expand(len(some), -1), BLOCK, some).tokens_RT.cpu())
    return torch.cat(blocks).view(len(prompts.seeds), fidelity.samples, BLOCK)


def joint_of(
    job: Job, blocks_CSK: Tensor, reference_CSK: np.ndarray, floor_C: list[float] | None = None
) -> dict[str, Any]:
    """Total variation to the AR model's blocks in hashed buckets, and the entropy of the offsets' marginals.

    Args:
        floor_C: total variation of another sample of the AR model after the same contexts, for the excess over it.
    """
    tv, entropy = [], []
    for mine, theirs in zip(blocks_CSK, torch.from_numpy(reference_CSK), strict=True):
        tv.append(joint_tv(mine, theirs, job.config.fidelity.buckets))
        entropy.append(position_entropy(mine))
    values = {"tv": tv, "entropy": entropy}
    if floor_C is not None:
        values["excess"] = np.subtract(tv, floor_C).tolist()
    docs = heldout(job.subject, job.config, len(tv), 1, first=1000).doc_R
    figures = over_documents(np.array([*values.values()]).T, np.ones(len(tv)), docs, job.config)
    return {**dict(zip(values, figures, strict=True)), "by_context": tv, "documents": len(set(docs))}


def row(folder: Path, job: Job, given: Any) -> dict[str, Any]:
    """Everything about one way to decode but its speed."""
    assert job.row is not None
    made_by, text = job.row, job.config.text
    teacher = load_ar(job.subject.teacher).to(pick_device())
    prompts = heldout(job.subject, job.config, text.prompts, text.prompt_tokens)
    decoder = _decoder(job, made_by)
    done = decoder.decode(prompts.tokens_RN, text.new_tokens, prompts.seeds)
    figures = {
        "k": made_by.k,
        "method": made_by.method,
        "tokens": done.tokens_RT.tolist(),
        "passes": done.passes,
        **text_figures(job, prompts, cut(done.tokens_RT, job), teacher),
    }
    if made_by.same_noise:
        theirs = torch.tensor(given["references"]["texts"][made_by.coupling])
        figures |= _same_noise(job, prompts, done.tokens_RT.cpu(), theirs)
    if made_by.decoder != "assisted":  # one prompt at a time: hours
        reference = np.load(Path(job.subject.root) / "references" / "blocks.npz")["one"]
        floor = given["references"]["joint"]["by_context"]
        figures["joint"] = joint_of(job, next_blocks(job, decoder, "row"), reference, floor)
    return figures


def _decoder(job: Job, row: Row, temperature: float = 1.0) -> Decoder:
    trained = Path(job.subject.root) / f"train-{row.method}" if row.method else None
    noise = noise_of(job.subject.config)
    return decoder_of(row, job.subject.teacher, trained, job.subject.last.k, noise, temperature)


def _same_noise(job: Job, prompts: Prompts, mine_RT: Tensor, theirs_RT: Tensor) -> dict[str, Any]:
    same = same_so_far(mine_RT, theirs_RT).double()
    sums = torch.stack([same[:, : min(BLOCK, same.shape[1])].amin(1), same.sum(1)], dim=1).numpy()
    block, until = over_documents(sums, np.ones(len(sums)), prompts.doc_R, job.config)
    return {"first_tokens_same": block, "tokens_until_divergence": until}


def external(folder: Path, job: Job, given: dict[str, Any]) -> dict[str, Any]:
    """Gen-PPL of several rows' texts."""
    judge_model = load_external(str(job.config.text.external))
    texts = {name: given[f"row-{slug(name)}"]["tokens"] for name in job.rows if name != "AR again"}
    if "AR again" in job.rows:
        texts["AR again"] = given["references"]["again"][0]
    return {name: perplexity(job, judge_model, given["references"]["prompts"], made) for name, made in texts.items()}


def perplexity(job: Job, model: Any, prompts: list[str], made: list[list[int]]) -> dict[str, Any] | None:
    """Gen-PPL of continuations with its interval, weighted by token; none without any token."""
    tokenizer = load_tokenizer(job.subject.tokenizer)
    texts = [str(tokenizer.decode(row)) for row in cut(torch.tensor(made), job)]
    found = gen_ppl(model, texts, prompts)
    doc_R = heldout(job.subject, job.config, job.config.text.prompts, 1).doc_R
    intervals = found.intervals(job.config.bootstrap, job.config.seed, doc_R)
    return asdict(intervals["by_token"]) | {"by_document": found.by_document} if intervals else None


def frontier(folder: Path, job: Job, given: dict[str, Any]) -> list[dict[str, Any]]:
    """Gen-PPL and entropy of AR and the last student at other temperatures."""
    text, model = job.config.text, load_external(str(job.config.text.external))
    prompts = heldout(job.subject, job.config, text.prompts, text.prompt_tokens)
    teacher = load_ar(job.subject.teacher).to(pick_device())
    last = job.subject.last
    design = PushForwardLM.from_pretrained(last.path).config.design
    points = []
    for name, k in (("AR", 1), (last.name, last.k)):
        for temperature in text.cold:
            if name != "AR" and not design.conditional and design.noise.clamp(temperature) != temperature:
                continue
            path = "" if name == "AR" else last.path
            row = Row(name, k, "ar" if name == "AR" else "engine", path=path, coupling=design.coupling)
            made = _decoder(job, row, temperature).decode(prompts.tokens_RN, text.new_tokens, prompts.seeds).tokens_RT
            figures = text_figures(job, prompts, cut(made, job), teacher)
            ppl = perplexity(job, model, given["references"]["prompts"], made.tolist())
            point = {"name": name, "k": k, "coupling": row.coupling, "temperature": temperature, "gen_ppl": ppl}
            points.append({**point, **figures})
    return points


def text_distance(folder: Path, job: Job, given: dict[str, Any]) -> dict[str, Any]:
    """MAUVE of each text against several of the AR model under other noise; the AR model's own is the ceiling."""
    model = load_external(str(job.config.text.external))
    tokenizer = load_tokenizer(job.subject.tokenizer)
    texts = {name: given[f"row-{slug(name)}"]["tokens"] for name in job.rows}

    def seen(made: list[list[int]]) -> np.ndarray:
        rows = cut(torch.tensor(made), job)
        whole = [p + str(tokenizer.decode(row)) for p, row in zip(given["references"]["prompts"], rows, strict=True)]
        return features(model, whole)

    theirs = [seen(made) for made in given["references"]["again"]]
    found = {}
    for name, made in texts.items():
        mine = seen(made)
        values = [mauve(other, mine, None, seed) for seed, other in enumerate(theirs)]
        found[name] = {"value": statistics.mean(values), "lo": min(values), "hi": max(values)}
    return found


def joint(folder: Path, job: Job, given: Any) -> dict[str, Any]:
    """The joint distribution of a student's next k tokens after held-out contexts, against the AR model's."""
    assert job.student is not None
    config, fidelity, k = job.config, job.config.fidelity, job.k
    device = pick_device()
    teacher = load_ar(job.subject.teacher).to(device)
    model = PushForwardLM.from_pretrained(job.student.path).to(device)
    contexts = heldout(job.subject, config, fidelity.contexts, job.subject.config.data.block, first=1000)
    design, vocabulary = model.config.design, head(teacher).weight.shape[0]
    roll_out = ARTeacher(teacher, COUPLINGS["inverse_cdf"]).rollout
    by = "samples" if not design.conditional else "enumeration" if enumerable(vocabulary, k) else "densities"
    rows, names = [], []

    def drawn(c: int, name: str, draw: Any = roll_out) -> Tensor:
        return sample_blocks(draw, contexts.tokens_RN[c], k, fidelity.samples, derive_key(config.seed, name, c))

    for c, context_N in enumerate(contexts.tokens_RN):
        if design.conditional:
            blocks = None if by == "enumeration" else drawn(c, "one")
            found = divergence(ar_score(teacher), student_score(model), context_N, k, vocabulary, blocks)
            names, values = list(asdict(found)), list(asdict(found).values())
        else:
            with torch.inference_mode():
                mine = drawn(c, "student", lambda w: model.draw(w).tokens_BWK)
            one, two, buckets = drawn(c, "one"), drawn(c, "two"), _buckets(k, fidelity.buckets)
            lines = {"tv": mine, "floor_tv": two, "independent_tv": independent(two, 0)}
            names, values = list(lines), [joint_tv(blocks, one, buckets) for blocks in lines.values()]
        rows.append(values)
    figures = over_documents(np.array(rows), np.ones(len(rows)), contexts.doc_R, config)
    return {"k": k, "by": by, "samples": fidelity.samples, **dict(zip(names, figures, strict=True))}


def _buckets(k: int, at_four: int) -> int:
    """About as many cells for every k as for four tokens."""
    return max(2, round(at_four ** (4 / k)))


def free(folder: Path, job: Job, given: Any) -> dict[str, Any]:
    """Fidelity by distance from the prompt, the decoder's own text being the context."""
    config, fidelity = job.config, job.config.fidelity
    device = pick_device()
    teacher = load_ar(job.subject.teacher).to(device)
    positions = getattr(teacher.config, "max_position_embeddings", 10**9)
    new = min(fidelity.free_tokens, positions - config.text.prompt_tokens - job.subject.last.k)
    prompts = heldout(job.subject, config, fidelity.free_prompts, config.text.prompt_tokens, first=500)
    assert job.student is not None
    model = PushForwardLM.from_pretrained(job.student.path).to(device)
    coupling = model.config.design.coupling
    made = EngineDecoder(model, job.k, coupling).decode(prompts.tokens_RN, new, prompts.seeds).tokens_RT
    own = EngineDecoder(teacher, 1, coupling).decode(prompts.tokens_RN, new, prompts.seeds).tokens_RT
    run = free_run(teacher, prompts.tokens_RN, made.to(device), prompts.seeds, COUPLINGS[coupling])
    same = same_so_far(made, own)
    edges = np.unique(np.linspace(0, new, BINS + 1).astype(int))
    curves: dict[str, list[Any]] = {"upto": edges[1:].tolist()}
    for name, values in (*asdict(run).items(), ("same", same)):
        sums = [values[:, a:b].double().sum(1).cpu().numpy() for a, b in itertools.pairwise(edges)]
        widths = np.diff(edges)
        curves[name] = [
            over_documents(s[:, None], np.full(len(s), float(w)), prompts.doc_R, config)[0]
            for s, w in zip(sums, widths, strict=True)
        ]
    repetition = diversity(made.tolist()).intervals(config.bootstrap, config.seed, prompts.doc_R)["repetition"]
    assert repetition is not None
    return {"k": job.k, **curves, "repetition": asdict(repetition)}


def speed(folder: Path, job: Job, given: Any) -> dict[str, Any]:
    """Tokens a second of every row, prompts included: rows take turns, medians of rounds. And what batch invariance costs.

    Each round continues prompts of its own, since decoders that verify are as fast as a text is easy to guess.
    """
    config, rows = job.config, rows_in(Path(job.subject.root))
    rates: dict[str, dict[str, list[float]]] = {row.name: {} for row in rows}
    for number in range(config.speed.rounds):
        for row in rows:
            decoder = _decoder(job, row)  # one model at a time in memory
            for batch in config.speed.sizes:
                if row.decoder == "assisted" and batch > 1:
                    continue  # transformers takes one prompt at a time
                rates[row.name].setdefault(str(batch), []).append(_rate(job, decoder, batch, number))
    found = {
        name: {batch: {"value": statistics.median(r), "lo": min(r), "hi": max(r)} for batch, r in batches.items()}
        for name, batches in rates.items()
    }
    return {"rows": found, "batch_invariant": _invariance(job), "machine": _machine()}


def _machine() -> str:
    """What was measured on."""
    cores = f"{torch.get_num_threads()} threads of {platform.processor() or platform.machine()}"
    return torch.cuda.get_device_name() if torch.cuda.is_available() else cores


def _rate(job: Job, decoder: Decoder, batch: int, number: int) -> float:
    """Tokens a second of one decoding, after one that is not counted."""
    text = job.config.text
    prompts = heldout(job.subject, job.config, batch, text.prompt_tokens, first=2000 + number * SPREAD * batch)
    decoder.decode(prompts.tokens_RN, text.new_tokens, prompts.seeds)
    started = _now()
    decoder.decode(prompts.tokens_RN, text.new_tokens, prompts.seeds)
    return batch * text.new_tokens / (_now() - started)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def rows_in(root: Path) -> list[Row]:
    """The rows of an evaluation in order."""
    return [Row(**record) for record in json.loads((root / "rows.json").read_text())]


def _invariance(job: Job) -> dict[str, float]:
    """Seconds a token of one request in 16 slots, as it is and batch-invariant."""
    text, config = job.config.text, job.config
    prompts = heldout(job.subject, config, 1, text.prompt_tokens)
    request = Request(prompts.tokens_RN[0].tolist(), text.new_tokens)
    teacher, found = load_ar(job.subject.teacher).to(pick_device()), {}
    for name, invariant in (("plain", False), ("invariant", True)):
        options = EngineConfig(16, text.prompt_tokens + text.new_tokens, batch_invariant=invariant)
        engine, times = Engine(teacher, options), []
        engine.generate([request])
        for _ in range(config.speed.rounds):
            started = _now()
            engine.generate([request])
            times.append((_now() - started) / text.new_tokens)
        found[name] = statistics.median(times)
    return found


def judged(folder: Path, job: Job, given: dict[str, Any]) -> dict[str, Any]:
    """Win rate of each row's texts against the AR model's under an LLM judge that is asked both orders."""
    section = job.config.judge
    asked = JudgeConfig(str(section.url), section.model, key_env=section.key_env, max_tokens=section.max_tokens)
    tokenizer = load_tokenizer(job.subject.tokenizer)

    def texts(made: list[list[int]]) -> list[str]:
        return [str(tokenizer.decode(row)) for row in cut(torch.tensor(made), job)]

    prompts, theirs = given["references"]["prompts"], texts(given["references"]["again"][0])
    docs = dict(zip(prompts, heldout(job.subject, job.config, len(prompts), 1).doc_R.tolist(), strict=True))
    found: dict[str, Any] = {}
    for name in job.rows:
        mine = texts(given[f"row-{slug(name)}"]["tokens"])
        pairs = [Pair(*pair) for pair in zip(prompts, theirs, mine, strict=True)]
        verdicts = judge(pairs, asked, folder / f"{slug(name)}.jsonl")
        documents = [docs[prompt] for prompt in verdicts.prompts]
        intervals = verdicts.intervals(job.config.bootstrap, job.config.seed, documents)
        found[name] = {**{n: asdict(i) for n, i in intervals.items()}, "invalid": verdicts.invalid}
    return found


def slug(name: str) -> str:
    """A row's name as a folder's."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
