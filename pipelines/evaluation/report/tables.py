"""The tables of `report.md`."""

from __future__ import annotations

from pipelines.evaluation.config import EvaluationConfig
from pipelines.evaluation.report.cells import Record, count, flops, interval, rate, value
from pipelines.evaluation.subject import Subject
from pipelines.runs.report import ratio
from pipelines.tables import markdown_table


def baselines_table(report: Record, config: EvaluationConfig) -> str:
    """The main table: quality, passes, speed and training FLOPs of every way to decode."""
    batches = [str(b) for b in config.speed.sizes]
    head = [
        "decoder",
        "joint TV of 4 tokens",
        "beyond two AR samples",
        "NLL under the AR model",
        "Gen-PPL",
        "entropy",
        "distinct-2",
        "repetition",
        "tokens until it leaves AR's text",
        "passes a token",
        *(f"tokens/s, batch {b}" for b in batches),
        "training FLOPs (core-s)",
    ]
    return markdown_table(head, [_baselines_row(row, batches) for row in report["rows"]])


def _baselines_row(row: Record, batches: list[str]) -> list[str]:
    training = flops(row["training"]["flops"])
    if row["own"]:
        training = f"**{training}**"
    elif row["method"]:
        training += f" ({row['training']['seconds']:.0f})"
    joint = row.get("joint", {})
    return [
        row["name"],
        interval(joint.get("tv"), 3),
        interval(joint.get("excess"), 3),
        interval(row["nll"]),
        interval(row["gen_ppl"], 1),
        value(row["entropy"]),
        f"{row['distinct']['2']:.2f}",
        value(row["repetition"]),
        interval(row.get("tokens_until_divergence"), 1),
        f"{row['passes']:.2f}",
        *(rate(row["tokens_per_s"].get(b)) for b in batches),
        training,
    ]


def windows_table(windows: Record) -> str:
    """Match and NLLs by offset of each student at each k, on held-out windows."""
    head = ["student", "match by offset", "whole block", "NLL under AR, its tokens / AR's own", "target NLL"]
    rows = []
    for name, f in windows.items():
        both = zip(f["student_nll"], f["teacher_nll"], strict=True)
        rows.append(
            [
                name,
                " · ".join(ratio(m) for m in f["match"]),
                ratio(f["block_match"]),
                " · ".join(f"{a['value']:.2f} / {b['value']:.2f}" for a, b in both),
                " · ".join(f"{t['value']:.2f}" for t in f["target_nll"]),
                f"{f['windows']:,}, {f['documents']}",
            ]
        )
    return markdown_table([*head, "windows, documents"], rows)


BY = {
    "enumeration": "all blocks, enumerated",
    "densities": "exact densities of {samples:,} blocks",
    "samples": "samples in hashed cells (floor {floor:.3f})",
}


def joint_table(joint: Record, subject: Subject) -> str:
    """Divergence of the joint distribution of k tokens, beside that of independent draws from the AR model's marginals."""
    head = ["student", "total variation", "of independent marginals", "KL, nats", "of independent marginals", "by"]
    rows = []
    for name, f in joint.items():
        by = BY[f["by"]].format(samples=f["samples"], floor=f.get("floor_tv", {}).get("value"))
        divergences = [f["tv"], f["independent_tv"], f.get("kl"), f.get("independent_kl")]
        rows.append([name, *(interval(d, 3) for d in divergences), by])
    text, last = markdown_table(head, rows), joint[f"{subject.last.name} at k={subject.last.k}"]
    if subject.last.k > 1 and "independent_kl" in last:
        text += (
            f"\n\nA decoder that fills {subject.last.k} masks in one pass draws each of them from its own marginal "
            "(Theorem 1 of the paper). However well such a decoder is trained, it is at least "
            f"{interval(last['independent_kl'], 3)} nats away from this AR model."
        )
    return text


def free_table(free: Record) -> str:
    """Fidelity in the first and the last stretch of the free run."""
    head = ["student", "tokens from the prompt", "same token as AR, given the text so far", "its NLL / AR's own"]
    rows = []
    for name, f in free.items():
        for i in (0, len(f["upto"]) - 1):
            start = f["upto"][i - 1] if i else 0
            rows.append(
                [
                    name,
                    f"{start}–{f['upto'][i]}",
                    ratio(f["match"][i]),
                    f"{f['decoder_nll'][i]['value']:.2f} / {f['teacher_nll'][i]['value']:.2f}",
                    f"{f['same'][i]['value']:.2f}",
                    f"{f['repetition']['value']:.2f}",
                ]
            )
    return markdown_table([*head, "still AR's text", "repetition"], rows)


def text_table(report: Record, config: EvaluationConfig) -> str:
    """MAUVE, diversity with intervals, and the judge's verdicts."""
    head = ["text", "MAUVE", "entropy", "repetition", "length", "distinct-1, 2, 3", "judge: wins against AR, flips"]
    rows = []
    for row in [{"name": "AR, other noise", **report["references"]}, *report["rows"]]:
        verdict = row.get("judge")
        rows.append(
            [
                row["name"],
                interval(report["mauve"].get(row["name"])),
                interval(row["entropy"]),
                interval(row["repetition"]),
                interval(row["length"], 1),
                ", ".join(f"{row['distinct'][n]:.2f}" for n in ("1", "2", "3")),
                f"{interval(verdict.get('win_rate'))}, {interval(verdict.get('flip_rate'))}" if verdict else "–",
            ]
        )
    text = markdown_table(head, rows)
    if config.text.external:
        text += (
            f"\n\nThe external LM is {config.text.external}. MAUVE compares with {config.text.mauve_seeds} texts of the AR "
            "model under other noise: mean [smallest, largest]. The AR model's own MAUVE is the most to expect. It is "
            "measured for AR and the run's students. With few texts there are few clusters, and MAUVE tells texts apart "
            "less well."
        )
    return text


def training_table(cost: Record) -> str:
    """FLOPs and hours of the run's stages."""
    head = ["stage", "steps", "rollouts, FLOP", "training, FLOP", "rollout actors, h", "trainers, h", "wall, s"]
    rows = []
    for s in cost["stages"]:
        hours = [f"{s[n] / 3600:.3f}" if n in s else "–" for n in ("rollout_s", "trainer_s")]
        wall = f"{s['wall_s']:.0f}" if "wall_s" in s else "–"
        rows.append([s["name"], str(s["steps"]), flops(s["rollouts"]), flops(s["train"]), *hours, wall])
    return markdown_table(head, rows)


def savings_table(cost: Record) -> str:
    """What a decoded token saves against the AR model, and after how many tokens training has paid off."""
    batches = [name.removeprefix("saved_s_") for name in (cost["savings"] or [{}])[0] if name.startswith("saved_s_")]
    head = ["decoder", "FLOPs a token against AR's", "tokens until FLOPs are even"]
    for b in batches:
        head += [f"µs saved a token, batch {b}", "tokens until even"]
    rows = []
    for s in cost["savings"]:
        cells = [s["name"], f"{s['flops_a_token']:.2f}×", count(s["even_flops"])]
        for b in batches:
            cells += [f"{s[f'saved_s_{b}'] * 1e6:,.0f}", count(s[f"even_{b}"])]
        rows.append(cells)
    return markdown_table(head, rows)


def flips_table(determinism: Record) -> str:
    """Texts and tokens that change with precision and batch shape."""
    rows = []
    for name, f in determinism.items():
        rows += [[name, pair, f"{d['texts']:.0%}", f"{d['tokens']:.3%}"] for pair, d in f["flips"].items()]
        w = f["windows"]
        share = f"{w['bf16']:.2%} (first of a block {w['bf16_first']:.2%})"
        rows.append([name, "fp32 and bf16, held-out windows", "–", share])
    return markdown_table(["model", "compared", "texts that differ", "tokens that flip on equal contexts"], rows)


def precision_table(determinism: Record) -> str:
    """Fidelity to the fp32 AR model in every precision and batch shape."""
    head = ["model", "precision, slots", "same token as the fp32 AR model, given the text so far"]
    rows = [[name, f"{m['precision']}, {m['slots']}", ratio(m)] for name, f in determinism.items() for m in f["match"]]
    return markdown_table(head, rows)
