"""Recipes and their parts side by side: one teacher, one corpus, equal counted FLOPs, several seeds.

    python -m pipelines.benchmarks.compare [--only "NAME;NAME"] [--seeds N] [--share X] [section.field=value …]
    python -m pipelines.benchmarks.compare --cost        # parameters, FLOPs and bytes of a decoding step; trains nothing

The corpus and the AR teacher are the quickstart recipe's (trained once, kept in output_dir). Then every variant trains
its stages in a process of one core, rollouts included, until it has spent what the paper's recipe spends up to the
same k, counted by torch's FLOP counter on a real step. Finished (variant, seed) pairs are kept and skipped. Figures are
measured on held-out documents:

  TV        joint total variation to the teacher's samples in hashed buckets, with the floor of two teacher samples and the
            line of independent draws from the teacher's marginals
  entropy   sum of the positions' entropies, against the teacher's
  KL_j      from the teacher's distribution to the student's at offset j, given the teacher's tokens before
  match     same token as the teacher under the same noise, by offset and for the whole block, under both couplings

The table goes to `compare.md`, the figures to `compare.json`, a plot to `compare.png`. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
import torch
from matplotlib import pyplot as plt
from transformers import AutoModelForCausalLM, LlamaConfig

from kforcing.attention.reader import ar_block_logits
from kforcing.attention.windows import Windows, read_context
from kforcing.backbone import load_ar
from kforcing.coupling import COUPLINGS
from kforcing.design import Design, SequentialConfig
from kforcing.distillation.losses import SoftTargets, soft_target_kl
from kforcing.distillation.teachers import ARTeacher
from kforcing.metrics.flops import measured_step, predicted_step
from kforcing.metrics.joint import independent, joint_tv, position_entropy, sample_blocks
from kforcing.modeling import PushForwardLM
from kforcing.noise import derive_key, sample_anchors, window_noise
from pipelines.config.fingerprint import fingerprint
from pipelines.config.overrides import apply, override
from pipelines.config.recipes import recipe
from pipelines.config.schema import Config
from pipelines.config.section import ConfigError
from pipelines.config.stages import StageSpec, resolve, stage_spec
from pipelines.config.validation import validate
from pipelines.data.rows import sequences_of, tokens_of
from pipelines.data.token_store import TokenStore
from pipelines.files import atomic_file, atomic_write, write_json
from pipelines.log import log, show_progress
from pipelines.runs.cluster import connected, with_lasting_root, work_of_run
from pipelines.runs.pipeline import Pipeline
from pipelines.runs.stages import StageError, locked
from pipelines.training.single_process import LocalStudent

BUCKETS = {2: 24, 4: 6, 8: 2}
CONTEXTS = 10
EARLY = 0.15
"""Share of the budget of k = 4 that the sequential recipe spends on k = 2."""


@dataclass(frozen=True)
class Variant:
    """A named change to one of the two recipes."""

    name: str
    recipe: str
    words: dict[str, Any] = field(default_factory=dict)
    ks: tuple[int, ...] = (2, 4)
    """Stages that are measured."""
    early: float | None = None
    """Share of the budget of k = 4 to spend on k = 2, when it is not the paper's."""


def variants() -> list[Variant]:
    """Both recipes, then one change at a time to the sequential one."""
    part = "student.design.sequential."
    changes: dict[str, dict[str, Any]] = {
        "head alone": {part + "hints": "none", part + "draft": "none"},
        "hints: 1 layer": {part + "hint_layers": 1},
        "hints: half (2 layers)": {part + "hint_layers": 2},
        "hints: adapters": {part + "hints": "adapter"},
        "hints see no token": {part + "draft": "none"},
        "hints see a bigram draft": {part + "draft": "bigram"},
        "m = 8": {"rollout.teacher_top_k": 8},
        "m = full": {"rollout.teacher_top_k": 10**9},
        "local labels": {"rollout.teacher_top_k": None},
        "local, own windows": {"rollout.teacher_top_k": None, "train.on_policy_fraction": 0.5},
        "hard targets": {"loss": "hard"},
        "all weights": {part + "freeze_trunk": False},
        "shortlist of 32": {part + "shortlist": 32},
    }
    return [
        Variant("paper", "paper"),
        Variant("paper, AR targets", "paper", {"targets": "ar"}),
        Variant("sequential, k = 2", "quickstart", {"student.k": 2}, (2,)),
        Variant("sequential", "quickstart", ks=(4,), early=EARLY),
        *(Variant(name, "quickstart", words, (4,), EARLY) for name, words in changes.items()),
        Variant("long k = 2", "quickstart", ks=(4,)),
        Variant("k = 8", "quickstart", {"student.k": 8}, (8,), EARLY),
    ]


@dataclass(frozen=True)
class Trial:
    """One variant with one seed, and all its process needs."""

    variant: Variant
    stages: tuple[StageSpec, ...]
    """With the trial's seed."""
    teacher: str
    train: str
    heldout: str
    folder: str
    budgets: dict[int, float]
    """FLOPs to have spent up to each k."""
    references: str
    """File of the teacher's samples."""
    samples: int
    """Blocks drawn after each context for the joint figures."""

    @property
    def seed(self) -> int:
        """The seed of its stages."""
        return self.stages[0].seed


def student_of(trial: Trial) -> LocalStudent:
    """What trains a trial's stages in this process."""
    return LocalStudent(trial.stages, trial.teacher, trial.train, trial.folder, trial.variant.name)


def run_trial(trial: Trial) -> dict[str, Any]:
    """Train a trial's stages and measure each k."""
    torch.set_num_threads(1)
    file = Path(trial.folder, "result.json")
    if file.is_file():
        return json.loads(file.read_text())
    student = student_of(trial)
    teacher = load_ar(trial.teacher)
    previous: Path | None = None
    result: dict[str, Any] = {"variant": trial.variant.name, "seed": trial.seed, "k": {}}
    for k in (stage.k for stage in trial.stages):
        fixed = student.stages[k].train.steps if not trial.budgets else None
        cost = student.stage(k, fixed, trial.budgets.get(k), previous)
        previous = Path(trial.folder, f"k{k}")
        figures = {"cost": cost, "spent": student.spent}
        if k in trial.variant.ks:
            model = PushForwardLM.from_pretrained(previous)
            figures |= conditional_figures(model, teacher, trial, k) | joint_figures(model, trial, k)
        result["k"][str(k)] = figures
    write_json(file, result)
    return result


def heldout_windows(trial: Trial, k: int, blocks: int = 64, windows: int = 16) -> list[Windows]:
    """Held-out windows with noise, the same for every variant and seed."""
    store = TokenStore(trial.heldout, 0)
    rows = store.read(np.arange(blocks))
    seq = sequences_of(rows)
    tokens = tokens_of(rows)
    anchors = sample_anchors(derive_key(0, "compare", "anchors"), seq, tokens.shape[1], windows)
    noise = window_noise(derive_key(0, "compare", "noise"), seq, anchors, k)
    whole = Windows(tokens, anchors, noise, torch.ones(len(seq)))
    return [whole.rows(torch.arange(i, i + 16)) for i in range(0, blocks, 16)]


@torch.inference_mode()
def conditional_figures(model: PushForwardLM, teacher: Any, trial: Trial, k: int) -> dict[str, Any]:
    """KL and target NLL by offset along the teacher's tokens; match under each coupling; what a shortlist loses."""
    design = model.config.design
    names = list(COUPLINGS) if design.conditional else [design.coupling]
    kl, nll, tail = [], [], []
    match: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    for windows in heldout_windows(trial, k):
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


def joint_contexts(trial: Trial) -> torch.Tensor:
    """Held-out contexts whose next tokens are sampled, (CONTEXTS, N): the same for every variant."""
    rows = TokenStore(trial.heldout, 0).read(np.arange(CONTEXTS) + 1000)
    return tokens_of(rows)


def teacher_samples(trial: Trial) -> list[dict[str, torch.Tensor]]:
    """For each context two samples of the teacher's next tokens; made once and kept."""
    file = Path(trial.references)
    if not file.is_file():
        torch.set_num_threads(1)
        teacher = ARTeacher(load_ar(trial.teacher), COUPLINGS["inverse_cdf"])
        keys = {name: derive_key(0, "compare", name) for name in ("one", "two")}
        longest = max(BUCKETS)
        made = [
            {name: sample_blocks(teacher.rollout, context, longest, trial.samples, key) for name, key in keys.items()}
            for context in joint_contexts(trial)
        ]
        with atomic_file(file) as partial:
            torch.save(made, partial)
    return torch.load(file)


@torch.inference_mode()
def joint_figures(model: PushForwardLM, trial: Trial, k: int) -> dict[str, Any]:
    """Joint total variation and entropy on fixed contexts, with floor, independent line and the teacher's entropy."""
    figures: dict[str, list[float]] = {n: [] for n in ("tv", "floor", "independent", "entropy", "teacher_entropy")}
    key = derive_key(trial.seed, "compare", "student")
    for context, teacher in zip(joint_contexts(trial), teacher_samples(trial), strict=True):
        one, two = teacher["one"][:, :k], teacher["two"][:, :k]
        mine = sample_blocks(lambda w: model.draw(w).tokens_BWK, context, k, trial.samples, key)
        figures["tv"].append(joint_tv(mine, one, BUCKETS[k]))
        figures["floor"].append(joint_tv(two, one, BUCKETS[k]))
        figures["independent"].append(joint_tv(independent(two, 0), one, BUCKETS[k]))
        figures["entropy"].append(position_entropy(mine))
        figures["teacher_entropy"].append(position_entropy(one))
    return {name: statistics.mean(values) for name, values in figures.items()}


def config_of(variant: Variant, seed: int, options: Options) -> Config:
    """A variant's config with a seed, validated; `options.share` scales the paper's steps, and with them every budget."""
    config = dataclasses.replace(recipe(variant.recipe), seed=seed)
    for name, value in variant.words.items():
        config = override(config, name, value)
    config = apply(config, {}, [word for word in options.words if not word.startswith(PLACES)])
    stages = {name: stage for name, stage in config.stages.items() if name in [f"k{k}" for k in config.ks()]}
    config = dataclasses.replace(config, stages=stages)
    if variant.recipe == "paper":
        for k in config.ks():
            steps = stage_spec(config, k).train.steps
            config = override(config, f"stages.k{k}.train.steps", max(1, round(options.share * steps)))
    with tempfile.TemporaryDirectory() as folder:
        validate(dataclasses.replace(config, output_dir=f"{folder}/none"))
    noise = config.student.design.noise
    for name, value, only in (
        ("rollout.cache", config.rollout.cache, False),
        ("train.precision", config.train.precision, "fp32"),
        ("student.design.noise.temperature_min", noise.temperature_min, 1.0),
        ("student.design.noise.temperature_max", noise.temperature_max, 1.0),
    ):
        if value != only:
            raise ConfigError(f"{name}={value}: variants are compared with {name}={only} only; leave it out")
    return config


def trial_of(variant: Variant, seed: int, options: Options, common: dict[str, str], root: Path) -> Trial:
    """A variant with a seed, on the common teacher and corpus."""
    config, teacher = config_of(variant, seed, options), common["teacher_id"]
    name = fingerprint(config, options.share, teacher, variant.early, options.samples)
    folder = root / "trials" / f"{variant.name.replace(' ', '-').replace(':', '')}-s{seed}-{name}"
    samples = root / f"teacher-samples-{teacher}-{options.samples}.pt"
    stores = common["train"], common["heldout"]
    return Trial(
        variant, tuple(resolve(config)), common["teacher"], *stores, str(folder), {}, str(samples), options.samples
    )


def budgets_of(trial: Trial) -> dict[int, float]:
    """FLOPs that the paper's trial will have spent up to each k, from one counted step of each stage."""
    torch.set_num_threads(1)
    spent, previous = {0: 0.0}, None
    with tempfile.TemporaryDirectory() as folder:
        student = student_of(dataclasses.replace(trial, folder=folder))
        for k, spec in student.stages.items():
            flops = student.count(k, previous).total if spec.learns else 0.0
            previous = student.untrained(k, previous)
            spent[k] = max(spent.values()) + spec.train.steps * flops
    return spent


def with_budgets(trial: Trial, paper: dict[int, float]) -> Trial:
    """The same trial, to spend what the paper's recipe has spent at each k (k = 8 spends as much again as k = 4)."""
    spent = {**paper, 8: 2 * paper[4] - paper[2]}
    if trial.variant.early is not None:
        spent[2] = trial.variant.early * spent[4]
    return dataclasses.replace(trial, budgets=spent)


def run_all(trials: list[Trial]) -> list[dict[str, Any]]:
    """All trials as cluster tasks of one CPU, with a line for each that ends."""
    import ray

    task = ray.remote(num_cpus=1, max_retries=1)(run_trial)
    waiting = {task.remote(trial): trial for trial in trials}
    order, results = list(waiting), {}
    while waiting:
        done, _ = ray.wait(list(waiting))
        trial = waiting.pop(done[0])
        results[done[0]] = ray.get(done[0])
        log.info(f"{trial.variant.name}, seed {trial.seed}: done, {len(waiting)} to go")
    return [results[ref] for ref in order]


def mean(results: list[dict[str, Any]], k: int, *path: Any) -> tuple[float, float] | None:
    """(mean, half range) of a figure over seeds, or None where it does not exist."""
    values = []
    for result in results:
        value: Any = result["k"].get(str(k), {})
        for key in path:
            if isinstance(value, dict):
                value = value.get(key)
            elif isinstance(value, list):
                value = value[key] if key < len(value) else None
        if value is None or isinstance(value, dict | list):
            return None
        values.append(value)
    return statistics.mean(values), (max(values) - min(values)) / 2


def cell(figure: tuple[float, float] | None, digits: int = 3) -> str:
    """A mean with its half range over seeds, or a dash."""
    if figure is None:
        return "–"
    middle, half = figure
    return f"{middle:.{digits}f}" + (f" ± {half:.{digits}f}" if half else "")


def table(by_name: dict[str, list[dict[str, Any]]], k: int) -> str:
    """The table of one k."""
    lines = [
        f"| k = {k} | seeds | PFLOP | TV (floor, independent) | entropy (teacher) | KL by offset | "
        "match, inverse CDF: by offset, block | match, Gumbel: by offset, block | trained parameters |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, results in by_name.items():
        if mean(results, k, "tv") is None:
            continue
        kl = " ".join(cell(mean(results, k, "kl", j)) for j in range(1, k)) if mean(results, k, "kl", 0) else "–"
        if tail := [mean(results, k, "shortlist_tail", j) for j in range(k - 1)] if "shortlist" in name else []:
            kl += f" before the shortlist, which leaves out {' '.join(cell(t) for t in tail)} of the teacher's mass"

        def matches(coupling: str, results: list[dict[str, Any]] = results) -> str:
            if mean(results, k, "block_match", coupling) is None:
                return "–"
            offsets = " ".join(f"{m[0]:.2f}" for j in range(k) if (m := mean(results, k, "match", coupling, j)))
            return f"{offsets}, {cell(mean(results, k, 'block_match', coupling))}"

        flops = mean(results, k, "spent")
        assert flops is not None
        lines.append(
            f"| {name} | {len(results)} | {flops[0] / 1e15:.3f} | "
            f"{cell(mean(results, k, 'tv'))} ({cell(mean(results, k, 'floor'))}, {cell(mean(results, k, 'independent'))}) | "
            f"{cell(mean(results, k, 'entropy'), 2)} ({cell(mean(results, k, 'teacher_entropy'), 2)}) | {kl} | "
            f"{matches('inverse_cdf')} | {matches('gumbel')} | {results[0]['k'][str(k)]['cost']['trained_parameters']:,} |"
        )
    return "\n".join(lines)


def plot(by_name: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Total variation and entropy of every variant measured at k = 4, with their reference lines."""
    rows = [(name, results) for name, results in by_name.items() if mean(results, 4, "tv")][::-1]
    if not rows:
        return
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 1.4 + 0.3 * len(rows)), sharey=True, layout="constrained")
    names = [name for name, _ in rows]

    def values(figure: str) -> list[tuple[float, float]]:
        return [mean(results, 4, figure) or (0.0, 0.0) for _, results in rows]

    tv, entropy, teacher = values("tv"), values("entropy"), values("teacher_entropy")[0][0]
    left.barh(names, [v for v, _ in tv], xerr=[h for _, h in tv], color="tab:blue", alpha=0.8)
    for label, style in (("floor", ":"), ("independent", "--")):
        left.axvline(values(label)[0][0], color="black", linestyle=style, label=label)
    left.set(xlabel="joint total variation to the teacher, k = 4")
    right.barh(names, [v / teacher for v, _ in entropy], color="tab:green", alpha=0.8)
    right.axvline(1, color="black", linestyle=":")
    right.set(xlabel="entropy of the four tokens, share of the teacher's")
    left.legend(frameon=False, loc="lower right")
    left.grid(alpha=0.3, axis="x")
    right.grid(alpha=0.3, axis="x")
    figure.savefig(path, dpi=130)
    plt.close(figure)


@dataclass(frozen=True)
class Options:
    """The command line."""

    only: list[str] | None
    seeds: int
    share: float
    samples: int
    words: list[str]


PLACES = ("output_dir=", "data.cache_dir=", "tracking.")


def run(options: Options) -> dict[str, Any]:
    """Teacher, trials, table."""
    config = with_lasting_root(apply(override(recipe("paper"), "output_dir", "runs/compare"), {}, options.words))
    validate(config)
    if options.seeds < 1 or options.share <= 0 or options.samples < 1:
        raise ConfigError(
            f"--seeds {options.seeds}, --share {options.share} and --samples {options.samples} must be positive"
        )
    if any(word.startswith("student.k=") for word in options.words):
        raise ConfigError("student.k belongs to the variants here, which compare k = 2, 4 and 8; leave it out")
    known = [v.name for v in variants()]
    for name in options.only or []:
        if name not in known:
            raise ConfigError(f"--only {name}: the variants are {'; '.join(known)}")
    chosen = [v for v in variants() if options.only is None or v.name in options.only or v.name == "paper"]
    for variant in chosen:
        config_of(variant, 0, options)
    with locked(config.root, config.recipe), connected(config.root, work_of_run(config)):
        with Pipeline(config) as pipeline:
            prepared = pipeline.prepare()
            teacher = pipeline.teacher(prepared)
        folders = {name: str(prepared.split(name)) for name in ("train", "heldout")}
        common = {"teacher": str(teacher.folder), "teacher_id": teacher.fingerprint, **folders}
        first = trial_of(chosen[0], 0, options, common, config.root)
        import ray

        prepare_samples = ray.remote(num_cpus=1)(teacher_samples).remote(first)
        paper = ray.get(ray.remote(num_cpus=1)(budgets_of).remote(first))
        ray.get(prepare_samples)
        trials = []
        for variant in chosen:
            for seed in range(options.seeds):
                trial = trial_of(variant, seed, options, common, config.root)
                trials.append(trial if variant.name == "paper" else with_budgets(trial, paper))
        results = run_all(trials)
    by_name: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        by_name.setdefault(result["variant"], []).append(result)
    write_json(config.root / "compare.json", by_name)
    text = "\n\n".join(table(by_name, k) for k in (2, 4, 8))
    atomic_write(config.root / "compare.md", text + "\n")
    plot(by_name, config.root / "compare.png")
    print(text)
    return {"path": str(config.root / "compare.json"), "trials": len(results)}


COST_SHAPES = {
    "quickstart (3 × 128, vocabulary 512)": (512, 128, 3, 4, 512),
    "12 × 768, vocabulary 32,000": (32_000, 768, 12, 12, 3072),
}


def cost_table(k: int = 4, context: int = 60) -> tuple[str, dict[str, Any]]:
    """One cached decoding step of each kind of student with new weights: predicted and measured."""
    parts = {
        "paper": Design(),
        "sequential, all layers": Design("sequential", "gumbel"),
        "sequential, 1 layer": Design("sequential", "gumbel", sequential=SequentialConfig(hint_layers=1)),
        "sequential, 1 layer, shortlist 64": Design(
            "sequential", "gumbel", sequential=SequentialConfig(hint_layers=1, shortlist=64)
        ),
        "sequential, adapters": Design("sequential", "gumbel", sequential=SequentialConfig(hints="adapter")),
        "head alone": Design("sequential", "gumbel", sequential=SequentialConfig(hints="none", draft="none")),
    }
    lines, records = [], {}
    for shape, sizes in COST_SHAPES.items():
        vocabulary, width, layers, heads, mlp = sizes
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=mlp,
            max_position_embeddings=512,
        )
        lines += [
            f"| {shape}, k = {k} | parameters, M (beside the AR model) | MFLOP a token: predicted, measured | "
            "MB of weights a step: predicted, measured | against the paper's: FLOP, bytes |",
            "|---|---|---|---|---|",
        ]
        backbone = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
        own = sum(p.numel() for p in backbone.parameters())
        paper: Any = None
        for name, design in parts.items():
            student = PushForwardLM.from_backbone(backbone, k, design).eval()
            count = sum(p.numel() for p in student.parameters())
            said, seen = predicted_step(student, k), measured_step(student, k, context)
            paper = paper or seen
            lines.append(
                f"| {name} | {count / 1e6:.2f} ({(count - own) / 1e6:.2f}) | {said.flops / k / 1e6:.1f}, "
                f"{seen.flops / k / 1e6:.1f} | {said.bytes / 1e6:.1f}, {seen.bytes / 1e6:.1f} | "
                f"{seen.flops / paper.flops:.2f}×, {seen.bytes / paper.bytes:.2f}× |"
            )
            records[f"{shape}: {name}"] = {"predicted": asdict(said), "measured": asdict(seen), "parameters": count}
        lines.append("")
    return "\n".join(lines), records


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="NAMES", help="variants, separated by semicolons; the paper's always runs")
    parser.add_argument("--seeds", type=int, default=1, help="seeds of each variant (default 1)")
    parser.add_argument(
        "--share", type=float, default=1.0, help="share of the paper recipe's steps to spend (default 1)"
    )
    parser.add_argument("--cost", action="store_true", help="print what a decoding step costs, and nothing else")
    parser.add_argument("words", nargs="*", metavar="section.field=value", help="for every variant")
    parser.add_argument("--samples", type=int, default=16_384, help="blocks drawn after each context (default 16384)")
    given = parser.parse_intermixed_args()
    if given.cost:
        text, record = cost_table()
        print(text)
        print(json.dumps(record))
        return
    show_progress()
    try:
        only = given.only.split(";") if given.only else None
        record = run(Options(only, given.seeds, given.share, given.samples, given.words))
    except (ConfigError, StageError) as error:
        sys.exit(f"error: {error}")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
