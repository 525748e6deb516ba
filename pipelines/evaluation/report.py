"""`report.json` for programs; `report.md` with tables and plots for people; `samples.html` for eyes."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter

from pipelines.config.stages import resolve
from pipelines.data.tokenise import load_tokenizer
from pipelines.evaluation.baselines import METHODS, Row
from pipelines.evaluation.config import GPT2_LARGE, EvaluationConfig
from pipelines.evaluation.measure import rows_in, slug
from pipelines.evaluation.page import write_page
from pipelines.evaluation.subject import Subject
from pipelines.files import write_json
from pipelines.runs.report import bars, ratio
from pipelines.tracking.tracker import made_by

Record = dict[str, Any]

REPORTED = {
    "lm1b": [
        ("AR", "1", 104.8, "–", "2.03"),
        ("K-Forcing k=2", "1/2", 107.2, "50.2%", "3.48"),
        ("K-Forcing k=3", "1/3", 117.1, "45.1%", "4.99"),
        ("K-Forcing k=4", "1/4", 127.6, "42.9%", "6.77"),
    ],
    "owt": [
        ("AR", "1", 42.64, "–", "1.99"),
        ("K-Forcing k=2", "1/2", 32.82, "46.9%", "3.36"),
        ("K-Forcing k=3", "1/3", 29.67, "42.8%", "5.03"),
        ("K-Forcing k=4", "1/4", 24.97, "39.4%", "6.91"),
        ("MDLM k=1", "1", 65.2, "42.4%", "–"),
        ("MDLM k=2", "1/2", 224, "26.6%", "–"),
        ("Medusa k=4", "2 · 539/960", 44.2, "50.3%", "–"),
        ("PTP k=4", "2 · 339/960", 42.0, "49.6%", "–"),
    ],
}
"""The paper's (arXiv 2606.10820): passes a token, Gen-PPL by GPT-2-Large, wins against AR, thousand tokens/s at batch 16."""


def write_evaluation(subject: Subject, config: EvaluationConfig, results: Record, seconds: float) -> Record:
    """Write the report's files; returns the report."""
    root = Path(subject.root)
    rows = rows_in(root)
    cost = cost_record(subject, rows, results)
    report = {
        "name": subject.name,
        "seconds": round(seconds, 1),
        "machine": results["speed"]["machine"],
        "config": dataclasses.asdict(config),
        "rows": [row_record(row, results, cost) for row in rows],
        "windows": results["windows"],
        "joint": _named(results, "joint-", subject),
        "free": _named(results, "free-", subject),
        "determinism": {n.removeprefix("determinism-"): r for n, r in results.items() if n.startswith("determinism-")},
        "frontier": results.get("frontier", []),
        "mauve": results.get("mauve", {}),
        "judge": results.get("judge", {}),
        "references": {k: v for k, v in results["references"].items() if k not in ("texts", "again", "prompts")},
        "batch_invariant": results["speed"]["batch_invariant"],
        "cost": cost,
    }
    report["gen_ppl_again"] = results.get("gen-ppl-1", {}).get("AR again")
    write_json(root / "report.json", report)
    plot_windows(report["windows"], root / "match.png")
    plot_free(report["free"], root / "distance.png")
    plot_rivals(report["rows"], report["references"]["joint"]["tv"]["value"], config, root / "rivals.png")
    plots = ["match", "distance", "rivals"]
    if report["frontier"]:
        plot_frontier(report, config, root / "frontier.png")
        plots.append("frontier")
    write_page(root / "samples.html", subject, rows, results, load_tokenizer(subject.tokenizer))
    (root / "report.md").write_text(markdown(report, config, subject, plots))
    return report


def _named(results: Record, prefix: str, subject: Subject) -> Record:
    return {f"{s.name} at k={k}": results[f"{prefix}{s.name}-at-{k}"] for s, k in subject.pairs}


def row_record(row: Row, results: Record, cost: Record) -> Record:
    """One row of the rivals' table: quality, passes, speed, training cost. A student's also holds its fidelity."""
    record = {k: v for k, v in results[f"row-{slug(row.name)}"].items() if k != "tokens"}
    ppl = {**results.get("gen-ppl-1", {}), **results.get("gen-ppl-2", {})}.get(row.name)
    name = row.name.removeprefix("this run, ")
    student, _, k = name.partition(" at k=")
    training = results[f"train-{row.method}"] if row.method else {"flops": cost["spent"].get(student, 0.0)}
    record = {
        "name": row.name,
        **record,
        "gen_ppl": ppl,
        "tokens_per_s": results["speed"]["rows"][row.name],
        "training": training,
        "own": bool(row.path),
        "judge": results.get("judge", {}).get(row.name),
    }
    if row.path:
        at = f"{student}-at-{k}"
        record |= {"windows": results["windows"][name], "next_k": results[f"joint-{at}"], "free": results[f"free-{at}"]}
    return record


def cost_record(subject: Subject, rows: list[Row], results: Record) -> Record:
    """What the run cost, what a token saves, and after how many tokens that is even.

    A student is charged for its own stage and those before it, and compared with the AR model that draws by its coupling.
    Time is that of the machine where there is no GPU, else the time that GPUs were held.
    """
    stages, seconds = results["cost"]["stages"], _seconds(subject)
    for stage in stages:
        stage |= seconds.get(stage["name"], {})
    upto = {s.path: [stage for stage in stages if 0 < stage["k"] <= s.k] for s in subject.students}
    spent = {path: sum(s["rollouts"] + s["train"] for s in some) for path, some in upto.items()}
    decoding, rates, savings = results["cost"]["decoding"], results["speed"]["rows"], []
    ar_flops = decoding[0]["flops_a_token"]
    a_token = {f"this run, {entry['name']} at k={entry['k']}": entry["flops_a_token"] for entry in decoding}
    ar_rates = {row.coupling: rates[row.name] for row in rows if row.decoder == "ar"}
    for row in (row for row in rows if row.path and row.k > 1):
        line: Record = {"name": row.name, "flops_a_token": a_token[row.name] / ar_flops, "flops": spent[row.path]}
        line["even_flops"] = even(spent[row.path], ar_flops - a_token[row.name])
        spent_s = sum(s.get("device_s", math.nan) for s in upto[row.path])
        for batch, rate in ar_rates[row.coupling].items():
            saved = 1 / rate["value"] - 1 / rates[row.name][batch]["value"]
            line[f"saved_s_{batch}"], line[f"even_{batch}"] = saved, even(spent_s, saved)
        savings.append(line)
    return {
        "stages": stages,
        "flops": results["cost"]["flops"],
        "spent": {student.name: spent[student.path] for student in subject.students},
        "ar_flops_a_token": ar_flops,
        "savings": savings,
    }


def even(spent: float, saved: float) -> float | str:
    """Tokens after which so much a token has paid for what was spent: a number, `never`, or `unknown`."""
    if math.isnan(spent):
        return "unknown"
    return spent / saved if saved > 0 else "never"


def _seconds(subject: Subject) -> dict[str, Record]:
    """Measured times of the run's stages: the whole stage, what trainers and rollout actors worked, what GPUs were held.

    Empty where the run's report is not here, as for most registered models.
    """
    root, found = subject.config.root, {}
    if not (root / "report.json").is_file() or made_by(root).get("parent") != subject.parent:
        return {}
    specs = {spec.name: spec for spec in resolve(subject.config)}
    for cost in json.loads((root / "report.json").read_text())["costs"]:
        stage = specs.get(cost["name"])
        train = stage.train if stage else subject.config.teacher.train
        rollout = stage.rollout if stage else subject.config.rollout
        cached = rollout.cache
        times = {"wall_s": cost["seconds"], "trainer_s": cost["seconds"] * (1 - cost["data_wait"]) * train.workers}
        held_s = cost["seconds"] * train.workers * train.gpus_per_worker
        if "rollout_s" in cost:
            times["rollout_s"] = cost["rollout_s"] * train.batch * cost["steps"]
            if cached:  # made once, before training
                times["rollout_s"] /= rollout.cache_epochs
                times["wall_s"] += times["rollout_s"] / rollout.actors
            held_s += rollout.gpus_per_actor * (times["rollout_s"] if cached else cost["seconds"] * rollout.actors)
        times["device_s"] = held_s or times["wall_s"]
        found[cost["name"]] = times
    return found


def markdown(report: Record, config: EvaluationConfig, subject: Subject, plots: list[str]) -> str:
    """The report for people."""
    sections = [
        f"# Evaluation of {subject.name}",
        f"{len(report['rows'])} ways to decode, measured in {report['seconds']:.0f} s (without parts that were finished "
        "before). Brackets hold 95% intervals, bootstrapped over documents, unless another meaning is given. Every figure "
        "comes from a run here unless it is marked as reported.",
        "## Every rival, one table",
        rivals_table(report, config),
        _legend(report, config),
        "![quality against speed](rivals.png)",
        _reported(config),
        "## Fidelity under the same noise",
        windows_table(report["windows"]),
        "![match by offset](match.png)",
        "### The joint distribution of the next k tokens",
        joint_table(report["joint"], subject),
        "### Far from the prompt",
        free_table(report["free"]),
        "![fidelity by distance from the prompt](distance.png)",
        "## Text",
        text_table(report, config),
        "[Texts side by side, divergences marked](samples.html)"
        + ("\n\n![frontier](frontier.png)" if "frontier" in plots else ""),
        "## Cost",
        cost_tables(report["cost"]),
        "## Determinism",
        determinism_table(report),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _figure(figure: Record | None, digits: int = 2) -> str:
    return ratio(figure, digits) if figure else "–"


def _value(figure: Record | None) -> str:
    return f"{figure['value']:.2f}" if figure else "–"


def _rate(figure: Record | None) -> str:
    return f"{figure['value']:,.0f} [{figure['lo']:,.0f}, {figure['hi']:,.0f}]" if figure else "–"


def rivals_table(report: Record, config: EvaluationConfig) -> str:
    """Quality, passes, speed, training cost; a row a way to decode."""
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
    ]
    head += ["tokens until it leaves AR's text", "passes a token", *(f"tokens/s, batch {b}" for b in batches)]
    head += ["training FLOPs (core-s)"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in report["rows"]:
        speed = [_rate(row["tokens_per_s"].get(b)) for b in batches]
        cost = flops(row["training"]["flops"])
        if row["own"]:
            cost = f"**{cost}**"
        elif row["method"]:
            cost += f" ({row['training']['seconds']:.0f})"
        joint = row.get("joint", {})
        cells = [
            row["name"],
            _figure(joint.get("tv"), 3),
            _figure(joint.get("excess"), 3),
            _figure(row["nll"]),
            _figure(row["gen_ppl"], 1),
            _value(row["entropy"]),
            f"{row['distinct']['2']:.2f}",
            _value(row["repetition"]),
            _figure(row.get("tokens_until_divergence"), 1),
            f"{row['passes']:.2f}",
            *speed,
            cost,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _legend(report: Record, config: EvaluationConfig) -> str:
    references, text = report["references"], config.text
    ppl = report["gen_ppl_again"]
    lines = [
        f"* Texts: {text.prompts} held-out prompts of {text.prompt_tokens} tokens, {text.new_tokens} new ones. The AR "
        f"model's text under other noise: NLL {_figure(references['nll'])}, entropy {_value(references['entropy'])}"
        + (f", Gen-PPL {_figure(ppl, 1)}" if ppl else "")
        + ". NLL and Gen-PPL are two-sided: lower than AR's with a lower entropy is a collapse towards modes, not quality.",
        f"* Joint TV: total variation to the AR model's next four tokens in {config.fidelity.buckets}⁴ hashed cells, "
        f"{config.fidelity.samples:,} samples after each of {config.fidelity.contexts} prompts from "
        f"{references['joint']['documents']} documents; between two samples of the AR model "
        f"{_figure(references['joint']['tv'], 3)}, of independent draws from its marginals "
        f"{_figure(references['joint_independent']['tv'], 3)} ({_figure(references['joint_independent']['excess'], 3)} "
        "beyond). Contexts differ more than decoders do, so compare by the "
        "column beside it: how much farther than those two samples, context by context.",
        "* distinct-2 is one figure of all texts and has no interval.",
        "* Tokens until it leaves: how long a text is the AR model's own under the same noise (verified: all of it).",
        "* Passes count every model that runs. A pass of the AR model reads one token, one of the paper's K-Forcing 2k, one "
        "of MDLM the whole text.",
        f"* Every method had {config.rivals.share:g} of the FLOPs of the run's own students, teacher passes and rollouts "
        "included, and the run's optimiser settings; warm-up takes the same share of the steps. The rows of this run had all "
        "of it (bold): compare them with AR. K-Forcing is trained to the largest k and decoded at every smaller one.",
        "* MDLM's joint TV is that of four masks behind the prompt, which is shorter than its training blocks.",
        f"* Speed: the whole decoding with its prompts on {report['machine']}, medians of {config.speed.rounds} rounds "
        "[smallest, largest]; rows take turns, each round has prompts of its own, and the last row of a batch ends it. "
        "`transformers` assists one prompt at a time.",
    ]
    methods = {row["method"] for row in report["rows"] if row["method"]}
    if "paper" in methods:
        lines.append(
            "* The paper's recipe has this project's noise encoder, of 0.25 to 32 cycles over [0, 1]; the published one has "
            "1e-4 to 1, where near noises are almost the same."
        )
    lines += [f"* `{name}`: {text}." for name, text in METHODS.items() if name in methods]
    return "\n".join(lines)


def _reported(config: EvaluationConfig) -> str:
    protocols = [config.text.protocol] if config.text.protocol else list(REPORTED)
    what = "another protocol, model and machine: not to be compared line by line"
    if config.text.protocol:
        what = "the same prompt and text lengths and truncation; another model and machine"
        if config.text.external != GPT2_LARGE:
            what += f", and Gen-PPL here is by {config.text.external}"
    lines = [
        f"Reported by the paper, not run here ({what}):",
        "",
        "| reported | corpus | passes a token | Gen-PPL, GPT-2-Large | wins against AR | thousand tokens/s, batch 16, H100 |",
        "|---|---|---|---|---|---|",
    ]
    for protocol in protocols:
        lines += [
            f"| *{row[0]}* | {protocol} | " + " | ".join(f"*{x}*" for x in row[1:]) + " |" for row in REPORTED[protocol]
        ]
    return "\n".join(lines)


def windows_table(windows: Record) -> str:
    """Match and NLLs by offset of each student and k."""
    lines = [
        "| student | match by offset | whole block | NLL under AR, its tokens / AR's own | target NLL | windows, documents |",
        "|---|---|---|---|---|---|",
    ]
    for name, f in windows.items():
        match = " · ".join(ratio(m) for m in f["match"])
        nll = " · ".join(
            f"{a['value']:.2f} / {b['value']:.2f}" for a, b in zip(f["student_nll"], f["teacher_nll"], strict=True)
        )
        target = " · ".join(f"{t['value']:.2f}" for t in f["target_nll"])
        lines.append(
            f"| {name} | {match} | {ratio(f['block_match'])} | {nll} | {target} | {f['windows']:,}, {f['documents']} |"
        )
    return "\n".join(lines)


BY = {
    "enumeration": "all blocks, enumerated",
    "densities": "exact densities of {samples:,} blocks",
    "samples": "samples in hashed cells (floor {floor:.3f})",
}


def joint_table(joint: Record, subject: Subject) -> str:
    """Joint total variation and KL with the independent line."""
    lines = [
        "| student | total variation | of independent marginals | KL, nats | of independent marginals | by |",
        "|---|---|---|---|---|---|",
    ]
    for name, f in joint.items():
        by = BY[f["by"]].format(samples=f["samples"], floor=f.get("floor_tv", {}).get("value"))
        lines.append(
            f"| {name} | {_figure(f['tv'], 3)} | {_figure(f['independent_tv'], 3)} | {_figure(f.get('kl'), 3)} | "
            f"{_figure(f.get('independent_kl'), 3)} | {by} |"
        )
    last = joint[f"{subject.last.name} at k={subject.last.k}"]
    if subject.last.k > 1 and "independent_kl" in last:
        lines += [
            "",
            f"A decoder that fills {subject.last.k} masks in one pass draws them from their marginals, each by itself "
            f"(Theorem 1 of the paper): it is at least {_figure(last['independent_kl'], 3)} nats away from this AR model, "
            "however well it is trained.",
        ]
    return "\n".join(lines)


def free_table(free: Record) -> str:
    """First and last stretch of the free run."""
    lines = [
        "| student | tokens from the prompt | same token as AR, given the text so far | its NLL / AR's own | still AR's text "
        "| repetition |",
        "|---|---|---|---|---|---|",
    ]
    for name, f in free.items():
        for i in (0, len(f["upto"]) - 1):
            start = f["upto"][i - 1] if i else 0
            lines.append(
                f"| {name} | {start}–{f['upto'][i]} | {ratio(f['match'][i])} | {f['decoder_nll'][i]['value']:.2f} / "
                f"{f['teacher_nll'][i]['value']:.2f} | {f['same'][i]['value']:.2f} | {f['repetition']['value']:.2f} |"
            )
    return "\n".join(lines)


def text_table(report: Record, config: EvaluationConfig) -> str:
    """Diversity with intervals, MAUVE and the judge's verdicts."""
    lines = [
        "| text | MAUVE | entropy | repetition | length | distinct-1, 2, 3 | judge: wins against AR, flips |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in [{"name": "AR, other noise", **report["references"]}, *report["rows"]]:
        verdict = row.get("judge")
        wins = f"{_figure(verdict.get('win_rate'))}, {_figure(verdict.get('flip_rate'))}" if verdict else "–"
        distinct = ", ".join(f"{row['distinct'][n]:.2f}" for n in ("1", "2", "3"))
        lines.append(
            f"| {row['name']} | {_figure(report['mauve'].get(row['name']))} | {_figure(row['entropy'])} | "
            f"{_figure(row['repetition'])} | {_figure(row['length'], 1)} | {distinct} | {wins} |"
        )
    if config.text.external:
        lines += [
            "",
            f"External LM: {config.text.external}. MAUVE: against {config.text.mauve_seeds} texts of the AR model under "
            "other noise, mean [smallest, largest]; what the AR model scores there is the most to expect. Measured for AR "
            "and the run's students; with few texts it has few clusters and tells little apart.",
        ]
    return "\n".join(lines)


def cost_tables(cost: Record) -> str:
    """Training by stage, then what a token saves."""
    lines = [
        "| stage | steps | rollouts, FLOP | training, FLOP | rollout actors, h | trainers, h | wall, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for s in cost["stages"]:
        hours = [f"{s[n] / 3600:.3f}" if n in s else "–" for n in ("rollout_s", "trainer_s")]
        wall = f"{s['wall_s']:.0f}" if "wall_s" in s else "–"
        lines.append(
            f"| {s['name']} | {s['steps']} | {flops(s['rollouts'])} | {flops(s['train'])} | {' | '.join(hours)} | {wall} |"
        )
    batches = [name.removeprefix("saved_s_") for name in (cost["savings"] or [{}])[0] if name.startswith("saved_s_")]
    heads = [f"µs saved a token, batch {b} | tokens until even" for b in batches]
    lines += ["", "| decoder | FLOPs a token against AR's | tokens until FLOPs are even | " + " | ".join(heads) + " |"]
    lines.append("|---|---|---|" + "---|---|" * len(batches))
    for s in cost["savings"]:
        cells = [f"{s['flops_a_token']:.2f}×", _count(s["even_flops"])]
        for b in batches:
            cells += [f"{s[f'saved_s_{b}'] * 1e6:,.0f}", _count(s[f"even_{b}"])]
        lines.append(f"| {s['name']} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"AR: {cost['ar_flops_a_token'] / 1e6:.2f} MFLOP a token. Even: generated tokens after which decoding has saved what "
        "the student's stages cost; never, where a token costs more than AR's.",
    ]
    return "\n".join(lines)


def flops(number: float) -> str:
    """Three digits and a prefix."""
    for power, prefix in ((15, "P"), (12, "T"), (9, "G")):
        if number >= 10**power:
            return f"{number / 10**power:.3g} {prefix}"
    return f"{number / 1e6:.3g} M" if number else "0"


def _count(tokens: float | str) -> str:
    return tokens if isinstance(tokens, str) else f"{tokens:,.0f}"


def determinism_table(report: Record) -> str:
    """What precision and batch shape change."""
    lines = ["| model | compared | texts that differ | tokens that flip on equal contexts |", "|---|---|---|---|"]
    for name, f in report["determinism"].items():
        lines += [f"| {name} | {pair} | {d['texts']:.0%} | {d['tokens']:.3%} |" for pair, d in f["flips"].items()]
        w = f["windows"]
        lines.append(
            f"| {name} | fp32 and bf16, held-out windows | – | {w['bf16']:.2%} (first of a block {w['bf16_first']:.2%}) |"
        )
    lines += [
        "",
        "| model | precision, slots | same token as the fp32 AR model, given the text so far |",
        "|---|---|---|",
    ]
    for name, f in report["determinism"].items():
        lines += [f"| {name} | {m['precision']}, {m['slots']} | {ratio(m)} |" for m in f["match"]]
    plain, invariant = report["batch_invariant"]["plain"], report["batch_invariant"]["invariant"]
    lines += [
        "",
        f"Batch-invariant mode, one request in 16 slots: {plain * 1e3:.2f} → {invariant * 1e3:.2f} ms a token "
        f"({invariant / plain:.1f}×); with all slots in use it computes what a full batch does anyway.",
    ]
    return "\n".join(lines)


METHODS_SHORT = {
    "paper": "K-Forcing, paper",
    "sequential": "K-Forcing, sequential",
    "head": "sequential head alone",
    "inversion-heads": "noise inversion A",
    "inversion-causal": "noise inversion B; PTP",
    "mdlm": "MDLM",
    "medusa": "Medusa",
    "draft": "assisted",
}

# Colours that stay apart for most colour-blind readers (Okabe and Ito).
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442"]


def plot_windows(windows: Record, path: Path) -> None:
    """Match by offset, a line a student and k."""
    figure, axes = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    for colour, (name, f) in zip(COLOURS * 3, windows.items(), strict=False):
        values, errors = bars(f["match"])
        shift = 0.03 * (list(windows).index(name) - len(windows) / 2)
        axes.errorbar(
            [j + 1 + shift for j in range(len(values))], values, errors, marker="o", capsize=2, label=name, color=colour
        )
    axes.set(xlabel="offset in the block", ylabel="same token as the AR model", ylim=(0, 1.03))
    axes.set_xticks(range(1, max(len(f["match"]) for f in windows.values()) + 1))
    _finish(figure, axes, path)


def plot_free(free: Record, path: Path) -> None:
    """Stepwise match and NLL gap by distance from the prompt."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11.5, 3.6), layout="constrained")
    for colour, (name, f) in zip(COLOURS * 3, free.items(), strict=False):
        for axes, key in ((left, "match"), (right, "same")):
            values, errors = bars(f[key])
            axes.errorbar(f["upto"], values, errors, marker="o", markersize=3, capsize=2, label=name, color=colour)
        gap = [a["value"] - b["value"] for a, b in zip(f["decoder_nll"], f["teacher_nll"], strict=True)]
        middle.plot(f["upto"], gap, marker="o", markersize=3, color=colour, label=name)
    left.set(ylabel="same token as AR, given the text so far", ylim=(0, 1.03))
    middle.axhline(0, color="grey", linewidth=0.8)
    middle.set(ylabel="NLL of its tokens − of AR's own (nats)")
    right.set(ylabel="text is still AR's", ylim=(0, 1.03))
    for axes in (left, middle, right):
        axes.set_xlabel("tokens from the prompt")
        axes.grid(alpha=0.3)
    left.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _dots(axes: Any, rows: list[Record], places: list[tuple[float, float]], config: EvaluationConfig) -> None:
    """A mark for each row, one colour and shape a method, with its tokens a step beside it."""
    kinds = list(dict.fromkeys(_kind(row) for row in rows))
    for row, (x, y) in zip(rows, places, strict=True):
        i, own = kinds.index(_kind(row)), row["own"]
        label = (
            f"this run, {1 / config.rivals.share:.3g}× the budget" if own else METHODS_SHORT.get(_kind(row), _kind(row))
        )
        style = {"color": COLOURS[i % 7], "marker": "os^Dv"[i // 7 % 5], "fillstyle": "none" if own else "full"}
        axes.plot(x, y, linestyle="none", markersize=6, label=label, **style)
        axes.annotate(f" {row['k']}" if row["k"] else "", (x, y), fontsize=7)


def _kind(row: Record) -> str:
    return row["method"] or row["name"].split(",")[0]


def _legend_beside(axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axes.legend(unique.values(), unique.keys(), fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))


def _plain_log(axis: Any) -> None:
    """Whole numbers on a logarithmic axis."""
    for formatter in (axis.set_major_formatter, axis.set_minor_formatter):
        formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.set_tick_params(which="both", labelsize=7)


def plot_rivals(rows: list[Record], floor: float, config: EvaluationConfig, path: Path) -> None:
    """Quality (joint total variation) against speed, one panel a batch size."""
    batches = [str(b) for b in config.speed.sizes]
    width = 6.2 * len(batches)
    figure, panels = plt.subplots(1, len(batches), figsize=(width, 4.8), layout="constrained", squeeze=False)
    shown = [r for r in rows if "joint" in r]
    for axes, batch in zip(panels[0], batches, strict=True):
        axes.axhline(floor, color="grey", linewidth=0.8, linestyle="--", label="two samples of the AR model")
        _dots(axes, shown, [(r["tokens_per_s"][batch]["value"], r["joint"]["tv"]["value"]) for r in shown], config)
        axes.set(
            xlabel=f"tokens/s, batch {batch}", ylabel="joint TV to AR, next 4 tokens (lower is better)", xscale="log"
        )
        _plain_log(axes.xaxis)
        axes.grid(alpha=0.3)
    _legend_beside(panels[0][-1])
    figure.suptitle("Numbers are tokens a step", fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_frontier(report: Record, config: EvaluationConfig, path: Path) -> None:
    """Gen-PPL against entropy: temperatures of AR and the last student as lines, every row as a mark."""
    figure, axes = plt.subplots(figsize=(8.4, 4.8), layout="constrained")
    rows = [r for r in report["rows"] if r["gen_ppl"] and r["entropy"]]
    _dots(axes, rows, [(r["entropy"]["value"], r["gen_ppl"]["value"]) for r in rows], config)
    lines: dict[str, list[tuple[float, float, str]]] = {}
    for p in report["frontier"]:
        if p["gen_ppl"] and p["entropy"]:
            place = p["entropy"]["value"], p["gen_ppl"]["value"], f"T={p['temperature']}"
            ar = "AR, engine, Gumbel" if p["coupling"] == "gumbel" else "AR, engine"
            name = ar if p["name"] == "AR" else f"this run, {p['name']} at k={p['k']}"
            lines.setdefault(name, []).append(place)
    for colour, (name, points) in zip(("#000000", "#D55E00"), lines.items(), strict=False):
        row = next(r for r in report["rows"] if r["name"] == name)
        points.append((row["entropy"]["value"], row["gen_ppl"]["value"], ""))
        points.sort()
        axes.plot(
            [p[0] for p in points],
            [p[1] for p in points],
            "-",
            color=colour,
            linewidth=1,
            label=f"{name}, temperatures",
        )
        for x, y, text in points:
            axes.annotate(text, (x, y), fontsize=7, xytext=(4, -9), textcoords="offset points", color=colour)
    axes.set(xlabel="entropy of a text's tokens (nats)", ylabel="Gen-PPL under the external LM", yscale="log")
    _plain_log(axes.yaxis)
    axes.grid(alpha=0.3)
    _legend_beside(axes)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _finish(figure: Any, axes: Any, path: Path) -> None:
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)
