"""Tokens a step of students that were trained on text with other settings, in exact mode and by the engine.

    python -m pipelines.benchmarks.text_recipes --arm "default" --arm "slower train.lr=1e-3"
    python -m pipelines.benchmarks.text_recipes --arm-file arms.txt --text smollm2-chat sotu --seconds 150 --jobs 4

An *arm* is a name, and the `section.field=value` words that it changes of the recipe `quickstart`. Arms are trained one
after the other, or --jobs at a time, each in a process of its own, on a GPU where there is one. All have the same text, of
which every tenth document of the first corpus is held out. A corpus is `sotu`, `smollm2-chat` or a Parquet file with a
column `text`, or `tokens` where the ids are known; one that is named twice counts twice.

Of each arm: the counted FLOPs, the seconds, 1 + the accepted drafts on the text of the last tenth of the training ("text"),
and tokens a step on held-out prompts at temperatures 1, 0.7 and 0. Below --output are `arms.json`, `arms.md`, and a folder
of each arm with its log, its curve and, with --save, its student. It needs no Ray, DeepSpeed or MLflow.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from kforcing.backbone import load_ar
from kforcing.device import pick_device
from kforcing.distillation.losses import LossSums
from kforcing.distillation.text import TextBatch
from kforcing.engine import Engine, EngineConfig, Request, SamplingParams
from kforcing.loading import load_tokenizer, locate_model
from kforcing.modeling import PushForwardLM
from pipelines.config.overrides import override
from pipelines.config.recipes import recipe
from pipelines.config.section import ConfigError
from pipelines.config.stages import StageSpec, resolve
from pipelines.failures import ending_in_one_line
from pipelines.files import write_json
from pipelines.training.job import CANDIDATE_ROWS, stage_job
from pipelines.training.single_process import count_step, shortened, train_here

CORPORA = Path(__file__).resolve().parents[1] / "data" / "corpora"
TEMPERATURES = (1.0, 0.7, 0.0)
HELD_OUT = 10
"""One document out of so many of the first file is held out."""
CURVE = 50
"""Points of an arm's curve at most."""


EFFECTIVE = r"student\..+|loss|seed|train\.(?!workers|zero_stage|loss_chunk|checkpoint|log_every|max_failures).+"
"""What an arm may change."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """A name, and what it changes of the recipe."""

    name: str
    changes: tuple[str, ...]

    @classmethod
    def read(cls, line: str) -> Arm:
        """From a line: the name, then `section.field=value` words."""
        name, *changes = line.split()
        return cls(name, tuple(changes))

    def stage(self) -> StageSpec:
        """The one stage of the recipe. Raises ConfigError for a field without effect here, or a value that cannot be."""
        config = recipe("quickstart")
        for change in self.changes:
            path, _, value = change.partition("=")
            if not re.fullmatch(EFFECTIVE, path):
                raise ConfigError(
                    f"arm {self.name}: {path} has no effect here; change student.*, loss, seed or train.*"
                )
            config = override(config, path, value)
        return resolve(config)[-1]


def documents(source: str, tokenizer: Any) -> Iterator[list[int]]:
    """The token ids of each document, with EOS at the end."""
    file = CORPORA / f"{source}.parquet"
    table = pq.read_table(file if file.is_file() else source)
    if "tokens" in table.column_names:
        rows = table["tokens"].to_pylist()
    else:
        rows = tokenizer(table["text"].to_pylist(), add_special_tokens=False)["input_ids"]
    for ids in rows:
        yield [*ids, tokenizer.eos_token_id]


def prepare(given: argparse.Namespace) -> None:
    """Write what all arms share: the AR model, the training tokens and the held-out prompts."""
    root: Path = given.output
    folder, file = locate_model(given.model)
    teacher = load_ar(folder, file)
    teacher.save_pretrained(root / "teacher")
    tokenizer = load_tokenizer(folder, file)
    tokenizer.save_pretrained(root / "teacher")
    kept, prompts = [], []
    for number, source in enumerate(given.text):
        for index, ids in enumerate(documents(source, tokenizer)):
            if source == given.text[0] and index % HELD_OUT == 0:
                prompts += [ids[: given.prompt_tokens]] if number == 0 else []
            else:
                kept.append(np.array(ids, np.int32))
    np.save(root / "tokens.npy", np.concatenate(kept))
    write_json(root / "prompts.json", [p for p in prompts if len(p) == given.prompt_tokens][: given.prompts])


def batches_of(tokens_RN: Tensor, spec: StageSpec, device: torch.device) -> Any:
    """(step, steps) → the micro-batches of a step: rows in a random order of each epoch, every position a window."""
    size, k = spec.train.batch, spec.k
    windows = tokens_RN.shape[1] - k
    anchors_W = torch.arange(windows, device=device)
    per_epoch = len(tokens_RN) // size
    if not per_epoch:
        raise ValueError(f"{len(tokens_RN)} blocks of text are fewer than train.batch={size}")

    def batches(step: int, steps: int) -> list[Any]:
        epoch, place = divmod(step, per_epoch)
        order = torch.randperm(len(tokens_RN), generator=torch.Generator().manual_seed(spec.seed + epoch))
        rows = order[place * size : (place + 1) * size].split(spec.train.micro_batch)
        generator = torch.Generator(device).manual_seed(spec.seed + step)
        found = []
        for part in rows:
            noise = torch.rand(len(part), windows, k, dtype=torch.float64, device=device, generator=generator).clamp_(
                min=1e-12
            )
            found.append(TextBatch(tokens_RN[part.to(device)], anchors_W.expand(len(part), -1), noise))
        return found

    return batches


def in_time(module: Any, batches: Any, spec: StageSpec, seconds: float) -> StageSpec:
    """The stage with as many steps as this machine makes in so many seconds."""
    trial = copy.deepcopy(module)
    for steps in (3, 12):  # the first ones warm up
        taken = train_here(trial, batches, shortened(spec.train, steps), "trial", ("text", spec.seed)) / steps
    return dataclasses.replace(spec, train=shortened(spec.train, max(1, int(seconds / taken))))


class Curve:
    """Loss and accepted drafts while an arm is trained."""

    def __init__(self, steps: int):
        self.every, self.points, self.recent = max(1, steps // CURVE), [], []  # type: ignore[var-annotated]
        self.steps, self.began = steps, time.monotonic()

    def watch(self, step: int, sums: LossSums) -> None:
        """Keep the figures of a step."""
        accepted = (sums.match_K / sums.windows).sum().item()
        self.recent.append((sums.loss.item() / sums.tokens, accepted))
        if (step + 1) % self.every == 0 or step + 1 == self.steps:
            loss, text = (statistics.fmean(values) for values in zip(*self.recent, strict=True))
            point = {"step": step + 1, "seconds": time.monotonic() - self.began, "loss": loss, "text": text}
            self.points.append(point)
            self.recent = []
            print(json.dumps(point), flush=True)

    def last(self) -> float:
        """1 + the accepted drafts on the text, over the last tenth."""
        return statistics.fmean(p["text"] for p in self.points[-max(1, len(self.points) // 10) :])


def run_arm(given: argparse.Namespace, arm: Arm) -> dict[str, Any]:
    """Train an arm and measure it, in this process."""
    root: Path = given.output
    device, spec = pick_device(), arm.stage()
    job = stage_job(spec, str(root / arm.name), "", str(root / "teacher"), None)
    module: Any = job.init.build(given.chunk or spec.train.loss_chunk)
    module.eval().to(device)
    flat = torch.from_numpy(np.load(root / "tokens.npy", allow_pickle=False).astype(np.int64))
    block = given.block
    tokens_RN = flat[: len(flat) // block * block].view(-1, block).to(device)
    batches = batches_of(tokens_RN, spec, device)
    flops = count_step(module, lambda step, steps: batches(step, steps)[:1])
    micro_a_step = -(-spec.train.batch // spec.train.micro_batch)
    if given.seconds:
        spec = in_time(module, batches, spec, given.seconds)
    curve = Curve(spec.train.steps)
    seconds = train_here(module, batches, spec.train, arm.name, ("text", spec.seed), watch=curve.watch)
    student: PushForwardLM = module.model.eval()
    if spec.design.sequential.draft_rank:
        rows = min(CANDIDATE_ROWS, len(tokens_RN))
        few = dataclasses.replace(spec, train=dataclasses.replace(spec.train, batch=rows, micro_batch=rows))
        sample = batches_of(tokens_RN, few, device)(0, 1)[0]
        student.readout.fit_candidates(student.backbone, sample.windows, sample.blocks_BWK)  # type: ignore[operator]
    windows = spec.train.steps * spec.train.batch * (block - spec.k)
    result = {
        "arm": arm.name,
        "changes": list(arm.changes),
        "steps": spec.train.steps,
        "windows": windows,
        "epochs": spec.train.steps * spec.train.batch / len(tokens_RN),
        "flops": flops.total * micro_a_step * spec.train.steps,
        "seconds": seconds,
        "windows_per_s": windows / seconds,
        "text": curve.last(),
        "tokens_a_step": tokens_a_step(student, json.loads((root / "prompts.json").read_text()), given),
        "curve": curve.points,
    }
    (root / arm.name).mkdir(parents=True, exist_ok=True)
    if given.save:
        student.save_pretrained(root / arm.name)
    write_json(root / arm.name / "result.json", result)
    return result


def tokens_a_step(student: PushForwardLM, prompts: list[list[int]], given: argparse.Namespace) -> dict[str, float]:
    """Mean over prompts of the tokens a step that the engine makes in exact mode, with blocks of k tokens, by temperature."""
    longest = given.prompt_tokens + given.new_tokens
    engine = Engine(
        student,
        EngineConfig(min(64, len(prompts)), longest, acceptance="exact", adapt_width=False, graphs=False),
    )
    found = {}
    for temperature in TEMPERATURES:
        sampling = SamplingParams(temperature=temperature)
        requests = [Request(p, given.new_tokens, seed=i, sampling=sampling) for i, p in enumerate(prompts)]
        found[f"{temperature:g}"] = statistics.fmean(c.tokens_a_step for c in engine.generate(requests))
    return found


def describe(results: list[dict[str, Any]]) -> str:
    """The table of all arms."""
    lines = [
        "| arm | changes | steps | windows | FLOPs | seconds | text | T = 1, 0.7, 0 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        steps = ", ".join(f"{value:.3f}" for value in r["tokens_a_step"].values())
        lines.append(
            f"| {r['arm']} | {' '.join(r['changes'])} | {r['steps']} | {r['windows']:,} | {r['flops']:.2e} "
            f"| {r['seconds']:.0f} | {r['text']:.3f} | {steps} |"
        )
    return "\n".join(lines)


def read_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--arm", action="append", default=[], help="name, then section.field=value words")
    add("--arm-file", type=Path, help="one arm a line")
    add("--model", default="smollm2", help="a folder, hub id or smollm2 (default)")
    add("--text", nargs="+", default=["smollm2-chat"], help="corpora or Parquet files")
    add("--block", type=int, default=256, help="tokens of a sequence")
    add("--prompts", type=int, default=64, help="held-out prompts")
    add("--prompt-tokens", type=int, default=48)
    add("--new-tokens", type=int, default=96)
    add("--chunk", type=int, help="tokens whose logits exist at a time")
    add("--seconds", type=float, help="train each arm so long, instead of the steps of its recipe")
    add("--jobs", type=int, default=1, help="arms that are trained at the same time")
    add("--save", action="store_true", help="keep the students")
    add("--prepared", action="store_true", help="AR model, tokens and prompts are in --output already")
    add("--here", action="store_true", help=argparse.SUPPRESS)
    add("--output", type=Path, default=Path("runs/text-recipes"))
    return parser.parse_args(words)


@ending_in_one_line()
def main() -> None:
    """Train all arms and print the table."""
    given = read_arguments()
    lines = given.arm + (given.arm_file.read_text().splitlines() if given.arm_file else [])
    arms = [Arm.read(line) for line in lines if line.strip()]
    torch.set_float32_matmul_precision("high")
    if given.here:
        run_arm(given, arms[0])
        return
    for arm in arms:
        arm.stage()  # mistakes show before anything is trained
    if len({arm.name for arm in arms}) < len(arms):
        raise ConfigError("two arms have one name; give each its own")
    given.output.mkdir(parents=True, exist_ok=True)
    if not given.prepared:
        prepare(given)
    with ThreadPoolExecutor(given.jobs) as pool:
        results = [r for r in pool.map(lambda arm: _in_a_process(given, arm), arms) if r]
    write_json(given.output / "arms.json", results)
    (given.output / "arms.md").write_text(describe(results) + "\n")
    print(describe(results))


def _in_a_process(given: argparse.Namespace, arm: Arm) -> dict[str, Any] | None:
    words = [
        sys.executable,
        "-m",
        "pipelines.benchmarks.text_recipes",
        "--here",
        "--arm",
        " ".join([arm.name, *arm.changes]),
    ]
    for name in ("block", "prompt_tokens", "new_tokens", "output", "chunk", "seconds"):
        if getattr(given, name) is None:
            continue
        words += [f"--{name.replace('_', '-')}", str(getattr(given, name))]
    words += ["--save"] if given.save else []
    (given.output / arm.name).mkdir(parents=True, exist_ok=True)
    with (given.output / arm.name / "log.txt").open("w") as log:
        done = subprocess.run(words, stdout=log, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        print(f"warning: arm {arm.name} failed; see {given.output / arm.name / 'log.txt'}", file=sys.stderr)
        return None
    return json.loads((given.output / arm.name / "result.json").read_text())


if __name__ == "__main__":
    main()
