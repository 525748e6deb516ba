"""Exact mode against AR decoding: the same distribution in fp32, and how often rounding makes a difference in bf16.

    python -m pipelines.benchmarks.exactness [--tokens N] [--bf16 MODEL]

First, a random AR model with a vocabulary of 8, and a student of k=4 with 60% of its first drafts right, continue one context
many times, four tokens each. All 4,096 blocks of four tokens are enumerated, so that each mode has

  TV    total variation between the blocks that were drawn and the AR model's exact joint distribution; `floor` is that of as
        many blocks drawn from the exact distribution itself
  NLL   mean negative log-likelihood of the blocks under the AR model, in nats; that of the AR model's own blocks is `entropy`

With --bf16, a model (a directory, `smollm2`, or `random`: 12 layers of width 256) then decodes by AR, and in exact mode with
k=4. In bf16 a step that reads four tokens rounds otherwise than one that reads one. `differ` is the number of first
differences over the number of tokens up to them: beyond the first, two texts have nothing to compare. The last line is one
JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from kforcing.design import Design
from kforcing.engine import Engine, EngineConfig, Request, SamplingParams
from kforcing.metrics.external import load_external
from kforcing.metrics.joint import ar_score, exact_joint
from kforcing.modeling import PushForwardLM

V, K = 8, 4
CONTEXT = [1, 5, 2]
PROMPTS = (
    "The first thing that I noticed about the town was",
    "In the year 1905 a young clerk in Bern",
    "To bake a good loaf of bread you need",
    "def fibonacci(n):",
    "Dear Sir or Madam, I am writing to",
    "The committee met on Tuesday and decided that",
    "Water boils at a lower temperature on a mountain because",
    "She opened the door, and behind it",
)


def main() -> None:
    """Read the command line, measure, print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=100_000, help="for each mode (default %(default)s)")
    parser.add_argument("--bf16", metavar="MODEL", nargs="*", default=[])
    parser.add_argument("--new", type=int, default=400, help="tokens of each of 8 texts in bf16 (default %(default)s)")
    given = parser.parse_args()
    joint = measure_joint(given.tokens)
    print("| mode | tokens a step | TV | NLL |\n|---|---|---|---|")
    print(f"| exact distribution | | {joint['floor']:.4f} ± {joint['floor_sd']:.4f} (floor) | {joint['entropy']:.4f} |")
    for mode in ("ar", "exact", "fixed"):
        row = joint[mode]
        print(f"| {mode} | {row['tokens_a_step']:.2f} | {row['tv']:.4f} | {row['nll']:.4f} ± {row['nll_se']:.4f} |")
    rounding = []
    if given.bf16:
        print("\n| bf16 | T | tokens | differ |\n|---|---|---|---|")
    for name, temperature in itertools.product(given.bf16, (0.0, 1.0)):
        rounding.append(row := measure_bf16(name, temperature, given.new))
        differ = f"{row['differ']} ({row['rate']:.2%})"
        print(f"| {name} | {temperature} | {row['tokens']} | {differ} |", flush=True)
    print(json.dumps({"joint": joint, "bf16": rounding}))


def measure_joint(tokens: int) -> dict[str, Any]:
    """The figures of the first table."""
    student = toy_student()
    context_N, S = torch.tensor(CONTEXT), tokens // K
    p = exact_joint(ar_score(student.backbone), context_N, K, V).flatten().clamp(min=0)
    generator = torch.Generator().manual_seed(0)
    floors = [_tv(torch.multinomial(p, S, replacement=True, generator=generator), p) for _ in range(20)]
    figures: dict[str, Any] = {
        "floor": statistics.mean(floors),
        "floor_sd": statistics.stdev(floors),
        "entropy": -torch.special.xlogy(p, p).sum().item(),
    }
    for mode in ("ar", "exact", "fixed"):
        engine = _engine(student, mode)
        done = engine.generate([Request(CONTEXT, K, seed) for seed in range(S)])
        cells_S = torch.tensor([c.tokens for c in done]) @ (V ** torch.arange(K - 1, -1, -1))
        nll_S = -p[cells_S].log()
        figures[mode] = {
            "tv": _tv(cells_S, p),
            "nll": nll_S.mean().item(),
            "nll_se": nll_S.std().item() / S**0.5,
            "tokens_a_step": engine.stats.tokens_a_step,
        }
    return figures


def toy_student() -> PushForwardLM:
    """A random AR model, and a student of it whose head says something else."""
    torch.manual_seed(0)
    backbone = _random(vocab_size=V, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, scale=24.0)
    student = PushForwardLM.from_backbone(backbone, K, Design("sequential", "gumbel")).eval()
    torch.nn.init.normal_(student.readout.correct.weight, std=0.15)
    return student


def _engine(student: PushForwardLM, mode: str) -> Engine:
    length = len(CONTEXT) + K
    if mode == "ar":
        return Engine(student.backbone, EngineConfig(256, length, coupling="gumbel", row_kernel=False))
    config = EngineConfig(256, length, acceptance=mode, adapt_width=False, row_kernel=False)
    return Engine(student, config)


def _tv(cells_S: Tensor, p: Tensor) -> float:
    shares = torch.bincount(cells_S, minlength=len(p)).double() / len(cells_S)
    return (shares - p).abs().sum().item() / 2


def measure_bf16(name: str, temperature: float, new: int) -> dict[str, Any]:
    """How often exact mode and AR decoding differ first, in bf16. Every step of exact mode reads four tokens."""
    if name == "random":
        torch.manual_seed(0)
        model: Any = _random(vocab_size=4096, hidden_size=256, num_hidden_layers=12, num_attention_heads=4, scale=3.0)
        model = model.bfloat16()
        prompts = torch.randint(0, 4096, (8, 12)).tolist()
    else:
        external = load_external(name, device="cpu", dtype="bf16")
        model, prompts = external.model, [external.tokenizer(text).input_ids for text in PROMPTS]
    length = max(map(len, prompts)) + new
    sampling = SamplingParams(temperature)
    requests = [Request(prompt, new, seed, sampling=sampling) for seed, prompt in enumerate(prompts)]
    ar = Engine(model, EngineConfig(len(prompts), length, coupling="gumbel")).generate(requests)
    config = EngineConfig(len(prompts), length, K, "exact", coupling="gumbel", batch_invariant=True)
    exact = Engine(model, config).generate(requests)
    firsts = [_first_difference(one.tokens, other.tokens) for one, other in zip(ar, exact, strict=True)]
    compared = sum(new if first is None else first + 1 for first in firsts)
    differ = sum(first is not None for first in firsts)
    figures = {"tokens": compared, "differ": differ, "rate": differ / compared}
    return {"model": name, "temperature": temperature, **figures}


def _first_difference(one: list[int], other: list[int]) -> int | None:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), None)


def _random(scale: float, **sizes: int) -> PreTrainedModel:
    """A Llama of random weights whose distributions are far from uniform."""
    config = LlamaConfig(**sizes, intermediate_size=2 * sizes["hidden_size"], max_position_embeddings=512)  # type: ignore[arg-type]
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(scale)
    return model


if __name__ == "__main__":
    main()
