"""Every other way to several tokens a pass, trained under one budget and decoded: the rows of the rivals' table.

A *method* is trained once, in one process, until it has spent its FLOPs (rollouts and teacher passes count). A *row* is a
way to decode: a method at a number of tokens a step, the AR model, or a student of the run.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from kforcing.backbone import load_ar
from kforcing.baselines.assisted import AssistedDecoder, draft_model
from kforcing.baselines.inversion import InversionStep, with_heads
from kforcing.baselines.mdlm import MaskedDecoder, MaskedLM, MaskedStep
from kforcing.baselines.medusa import MedusaDecoder, MedusaHeads, MedusaStep
from kforcing.baselines.ptp import PTPDecoder
from kforcing.baselines.rows import Decoded, Decoder, TextWindows
from kforcing.coupling import COUPLINGS
from kforcing.design import Design, NoiseConfig, SequentialConfig
from kforcing.device import pick_device
from kforcing.engine import Engine, EngineConfig, Request, SamplingParams
from kforcing.modeling import PushForwardLM
from kforcing.noise import derive_key, sample_anchors, uniform
from pipelines.config.schema import Config, TrainConfig
from pipelines.config.stages import resolve
from pipelines.data.rows import sequences_of, tokens_of
from pipelines.data.token_store import TokenStore
from pipelines.rollouts.plan import StepPlan
from pipelines.training.single_process import Batches, LocalStudent, count_step, shortened, train_here
from pipelines.training.step import ARStep, TokenBatch

STAGED = ("paper", "sequential", "head")
"""Methods that are trained stage by stage: K-Forcing."""


@dataclass(frozen=True)
class Trial:
    """A method to train."""

    method: str
    config: Config
    """Of the run: its data, optimiser and windows."""
    teacher: str
    store: str
    k: int
    seed: int
    share: float


@dataclass(frozen=True)
class Row:
    """A way to decode."""

    name: str
    k: int
    """Tokens a step; of decoders that verify, guesses a pass."""
    decoder: str
    """What decodes: `ar`, `transformers`, `engine` (a push-forward student), or a rival's own."""
    method: str | None = None
    """What was trained for it here; none for the AR model and the run's students."""
    path: str = ""
    """Folder of a student of the run."""
    coupling: str = "inverse_cdf"
    """By which noise becomes tokens, in its AR counterpart too."""
    same_noise: bool = True
    """Whether it can be compared with the AR model token by token."""


METHODS = {
    "paper": "K-Forcing, the paper's recipe: AR → k=1 → k=2 → …, self-forcing, argmax read-out",
    "sequential": "K-Forcing, sequential recipe: exact trunk, parallel hints, a small head, soft AR targets",
    "head": "one-layer sequential head on the AR trunk, no hints, no verification",
    "inversion-heads": "noise inversion A: one hint with all noises, k heads",
    "inversion-causal": "noise inversion B: causal hints; also the draft of PTP",
    "mdlm": "masked diffusion from the AR model's weights",
    "medusa": "Medusa heads, verified by the AR model",
    "draft": "one-layer AR draft model for assisted generation",
}


def rows_of(
    methods: list[str], students: list[tuple[str, str, int, str]], k: int, ks: list[int], couplings: dict[str, str]
) -> list[Row]:
    """The rows of the table: AR by its couplings and by `transformers`, the run's students, then what the methods allow.

    Args:
        students: (name, folder, tokens a step, coupling) of the run's students.
        k: tokens a step of the methods.
        ks: tokens a step at which K-Forcing is decoded.
        couplings: of the methods that are trained stage by stage.
    """
    rows = [Row("AR, engine", 1, "ar")]
    if "gumbel" in {*(coupling for *_, coupling in students), *couplings.values()}:
        rows.append(Row("AR, engine, Gumbel", 1, "ar", coupling="gumbel"))
    rows.append(Row("AR, transformers", 1, "transformers", same_noise=False))
    rows += [
        Row(f"this run, {name} at k={n}", n, "engine", path=path, coupling=coupling)
        for name, path, n, coupling in students
    ]
    made: dict[str, list[Row]] = {
        "paper": [Row(f"K-Forcing, paper, k{k} at k={n}", n, "engine", "paper") for n in ks],
        "sequential": [
            Row(f"K-Forcing, sequential, k{k} at k={n}", n, "engine", "sequential", coupling=couplings["sequential"])
            for n in ks
        ],
        "head": [Row(f"sequential head alone, k={k}", k, "engine", "head", coupling=couplings["head"])],
        "inversion-heads": [Row(f"noise inversion A (heads), k={k}", k, "engine", "inversion-heads")],
        "inversion-causal": [
            Row(f"noise inversion B (causal), k={k}", k, "engine", "inversion-causal"),
            Row(f"PTP, k={k}, verified", k, "ptp", "inversion-causal"),
        ],
        "mdlm": [Row(f"MDLM, {n} a pass", n, "mdlm", "mdlm", same_noise=False) for n in ks if n & (n - 1) == 0],
        "medusa": [Row(f"Medusa, k={k}, verified", k, "medusa", "medusa", coupling="gumbel")],
        "draft": [Row("transformers, assisted", 0, "assisted", "draft", same_noise=False)],
    }
    return rows + [row for method in methods for row in made[method]]


def noise_of(config: Config) -> NoiseConfig:
    """The noise encoder of all argmax students: the run's own, where it has one."""
    design = config.student.design
    return NoiseConfig(min_cycles=0.25, max_cycles=32.0) if design.conditional else design.noise


def spent_by(method: str, ks: list[int]) -> dict[int, float]:
    """Share of a staged method's budget that is spent by the end of each stage.

    Even for the paper's recipe; a sequential student learns most at its last k, and nothing at k = 1.
    """
    if method == "paper":
        return {k: (i + 1) / len(ks) for i, k in enumerate(ks)}
    return {k: 0.15 * i / max(1, len(ks) - 2) if k < ks[-1] else 1.0 for i, k in enumerate(ks)}


def method_config(method: str, config: Config, k: int, seed: int) -> Config:
    """The run's config turned to a K-Forcing method."""
    student = dataclasses.replace(config.student, k=k)
    designs = {
        "paper": Design(noise=noise_of(config)),
        "sequential": Design("sequential", "gumbel", sequential=SequentialConfig()),
        "head": Design("sequential", "gumbel", sequential=SequentialConfig(hints="none", draft="none")),
    }
    own = config.student.design
    design = own if (method == "sequential") == own.conditional and method != "head" else designs[method]
    train = dataclasses.replace(config.train, warm_start="previous", on_policy_fraction=0.0)
    soft = method != "paper"
    rollout = dataclasses.replace(
        config.rollout, teacher_top_k=(config.rollout.teacher_top_k or 32) if soft else None, cache=False
    )
    return dataclasses.replace(
        config,
        seed=seed,
        targets="ar" if soft else "self",
        loss="soft" if soft else "hard",
        student=dataclasses.replace(student, design=design),
        train=train,
        rollout=rollout,
        stages={},
    )


def train_rival(folder: Path, trial: Trial, given: dict[str, Any]) -> dict[str, Any]:
    """Train a method to its share of the run's FLOPs (part `cost`); what it cost. A killed training continues."""
    budget = trial.share * given["cost"]["flops"]
    if trial.method in STAGED:
        return _train_stages(folder, trial, budget)
    teacher, micro = load_ar(trial.teacher).to(pick_device()), trial.config.train.micro_batch
    torch.manual_seed(trial.seed)
    model = untrained(trial.method, trial.teacher, trial.k, noise_of(trial.config))
    module = _step(trial.method, model, teacher)
    flops = count_step(module, _batches(trial, micro)).times(trial.config.train.batch / micro)
    train = _train_config(trial, max(1, round(budget / flops.total)))
    seconds = train_here(module, _batches(trial, train.batch), train, trial.method, folder / "training.pt")
    save_model(model, str(folder / "model.safetensors"))
    return {
        "flops": train.steps * flops.total,
        "batch_flops": train.steps * flops.batch,
        "steps": train.steps,
        "seconds": seconds,
        "trained_parameters": sum(p.numel() for p in module.parameters() if p.requires_grad),
    }


def _train_stages(folder: Path, trial: Trial, budget: float) -> dict[str, Any]:
    config = method_config(trial.method, trial.config, trial.k, trial.seed)
    student = LocalStudent(resolve(config), trial.teacher, trial.store, str(folder), trial.method)
    previous, costs = None, []
    for k, share in spent_by(trial.method, config.ks()).items():
        costs.append(student.stage(k, None, share * budget, previous))
        previous = folder / f"k{k}"
    totals = {name: sum(c[name] for c in costs) for name in ("flops", "batch_flops", "steps", "seconds")}
    return {**totals, "trained_parameters": costs[-1]["trained_parameters"]}


def _train_config(trial: Trial, steps: int) -> TrainConfig:
    train = trial.config.train
    if trial.method == "draft" and trial.config.teacher.path is None:
        train = dataclasses.replace(train, lr=trial.config.teacher.train.lr)  # it learns what the teacher learned
    return shortened(train, steps)


def untrained(method: str, teacher: str, k: int, noise: NoiseConfig) -> Any:
    """What a method trains and decodes with, before its training."""
    backbone = load_ar(teacher)
    if method.startswith("inversion"):
        student = PushForwardLM.from_backbone(backbone, k, Design(noise=noise))
        return with_heads(student) if method == "inversion-heads" else student
    if method == "medusa":
        return MedusaHeads(backbone, k)
    if method == "mdlm":
        return MaskedLM(backbone)
    assert method == "draft", method
    return draft_model(backbone)


def _step(method: str, model: Any, teacher: Any) -> nn.Module:
    """The loss of a method as a module of one argument."""
    if method.startswith("inversion"):
        return InversionStep(model, teacher)
    if method == "medusa":
        return MedusaStep(teacher, model)
    return MaskedStep(model) if method == "mdlm" else ARStep(model)


def _batches(trial: Trial, batch: int) -> Batches:
    """Step → its real text in micro-batches, the same for any method of one shape."""
    store, config, k = TokenStore(trial.store, trial.seed), trial.config, trial.k
    micro, device = min(batch, config.train.micro_batch), pick_device()

    def windows(tokens: Tensor, seq: Tensor, key: int) -> TextWindows:
        N, offsets = tokens.shape[1], torch.arange(k)
        if trial.method == "mdlm":  # one uniform a position
            anchors, offsets = torch.arange(N).expand(len(seq), -1), torch.zeros(1, dtype=torch.int64)
        elif trial.method == "medusa":  # the trunk reads every position anyway
            offsets = torch.arange(k + 1)
            anchors = torch.arange(N - k - 1).expand(len(seq), -1)
        else:
            anchors = sample_anchors(key, seq, N - k, min(config.rollout.windows, N - k))
        noise = uniform(key, seq[:, None, None], anchors[..., None], offsets)
        return TextWindows(tokens.to(device), anchors.to(device), noise.to(device))

    def batches(step: int, steps: int) -> list[Any]:
        rows = store.read(StepPlan(batch, 1, step + 1, step, 1).positions(0))
        tokens = tokens_of(rows)
        seq = sequences_of(rows)
        key = derive_key(trial.seed, trial.method, rows["epoch"][0].as_py())
        parts = [slice(i, i + micro) for i in range(0, batch, micro)]
        if trial.method == "draft":
            return [TokenBatch(tokens[part].to(device)) for part in parts]
        return [windows(tokens[part], seq[part], key) for part in parts]

    return batches


class EngineDecoder:
    """The decode engine as a `Decoder`."""

    def __init__(self, model: Any, k: int, coupling: str, temperature: float = 1.0):
        self.model, self.k, self.coupling, self.temperature = model, k, coupling, temperature
        self._engine: Engine | None = None

    def decode(self, prompts_RN: Tensor, new_tokens: int, seeds: list[int]) -> Decoded:
        """See `Decoder`."""
        R, N = prompts_RN.shape
        if self._engine is None or (self._engine.config.max_num_seqs, self._engine.max_model_len) != (
            R,
            N + new_tokens,
        ):
            # On a GPU steps go in groups between two looks at the tokens: groups that end where the text does.
            group = math.gcd(8, -(-new_tokens // self.k)) if pick_device().type == "cuda" else 1
            config = EngineConfig(
                max_num_seqs=R,
                max_model_len=N + new_tokens,
                k=self.k,
                max_num_batched_tokens=R * N,
                check_every=group,
                coupling=self.coupling,
            )
            self._engine = Engine(self.model, config)
        steps, sampling = self._engine.stats.steps, SamplingParams(temperature=self.temperature)
        requests = [
            Request(p, new_tokens, seed=s, sampling=sampling) for p, s in zip(prompts_RN.tolist(), seeds, strict=True)
        ]
        done = self._engine.generate(requests)
        passes = (self._engine.stats.steps - steps) / new_tokens
        return Decoded(torch.tensor([c.tokens for c in done]), passes)


def decoder_of(
    row: Row, teacher: str, trained: Path | None, k: int, noise: NoiseConfig, temperature: float = 1.0
) -> Decoder:
    """The decoder of a row, on the device this process was given.

    Args:
        trained: folder of the row's method.
        k: tokens a step the method was trained for.
        noise: encoder of argmax students.
    """
    device = pick_device()
    if row.path or row.method in STAGED:
        assert row.path or trained
        student = PushForwardLM.from_pretrained(row.path or trained / f"k{k}").to(device)  # type: ignore[operator]
        return EngineDecoder(student, row.k, row.coupling, temperature)
    if row.decoder == "ar":
        return EngineDecoder(load_ar(teacher).to(device), 1, row.coupling, temperature)
    if row.decoder == "transformers":
        return AssistedDecoder(load_ar(teacher).to(device), None)
    assert row.method is not None
    model: Any = untrained(row.method, teacher, k, noise)
    load_model(model, f"{trained}/model.safetensors")
    model = model.to(device).eval()
    if row.decoder == "engine":
        return EngineDecoder(model, row.k, row.coupling)
    if row.decoder == "mdlm":
        return MaskedDecoder(model, row.k)
    ar = load_ar(teacher).to(device)
    if row.decoder == "ptp":
        return PTPDecoder(model, ar)
    if row.decoder == "medusa":
        return MedusaDecoder(ar, model, COUPLINGS[row.coupling])
    return AssistedDecoder(ar, model)
