"""Parameters, FLOPs and bytes of one decoding step of each kind of student."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from transformers import AutoModelForCausalLM, LlamaConfig

from kforcing.design import Design, SequentialConfig
from kforcing.metrics.flops import measured_step, predicted_step
from kforcing.modeling import PushForwardLM

COST_SHAPES = {
    "toy (3 × 128, vocabulary 512)": (512, 128, 3, 4, 512),
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
