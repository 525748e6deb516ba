"""What the columns and rows of the main table mean, and the figures that the paper reports."""

from __future__ import annotations

from pipelines.evaluation.baselines import METHODS
from pipelines.evaluation.config import GPT2_LARGE, EvaluationConfig
from pipelines.evaluation.report.cells import Record, interval, value
from pipelines.tables import markdown_table

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
"""From the paper (arXiv 2606.10820): method, passes a token, Gen-PPL by GPT-2-Large, wins against AR, thousand tokens/s at
batch 16."""


def legend(report: Record, config: EvaluationConfig) -> str:
    """The notes below the main table."""
    methods = {row["method"] for row in report["rows"] if row["method"]}
    lines = [
        *_quality_notes(report, config),
        "`passes a token` counts the passes of every model that runs. A pass of the AR model reads one token, a pass of "
        "the paper's K-Forcing reads 2k, and a pass of MDLM reads the whole text.",
        f"Every method had {config.baselines.share:g} of the FLOPs of the run's own students, with teacher passes and "
        "rollouts included, and the run's optimiser settings; warm-up takes the same share of the steps. The students of "
        "this run had all of these FLOPs (bold), so compare them with AR and not with the methods. K-Forcing is trained to "
        "the largest k and decoded at every smaller one.",
        f"`tokens/s` is for the whole decoding, prompts included, on {report['machine']}: the median of "
        f"{config.speed.rounds} rounds [smallest, largest]. Rows take turns, and each round has its own prompts. A batch "
        "ends when its slowest text ends. `transformers` takes one prompt at a time in assisted generation.",
    ]
    if any(", exact at k=" in row["name"] for row in report["rows"]):
        lines.append(
            "*Exact* rows verify their tokens against the AR model under the same noise, so the student decides only "
            "`passes a token` and `tokens/s`. That their text is the AR model's was measured: see `tokens until it leaves "
            "AR's text`. At k=auto the engine chooses in each step how many tokens it drafts, by what steps take here."
        )
    if "mdlm" in methods:
        lines.append(
            "The joint TV of MDLM is that of four masks behind the prompt, a text that is shorter than its training blocks."
        )
    if "paper" in methods:
        lines.append(
            "The paper's recipe is trained with this project's noise encoder, which has 0.25 to 32 cycles over [0, 1]. The "
            "published encoder has 1e-4 to 1 cycles, with which it can hardly tell noises apart that are close to each other."
        )
    lines += [f"`{name}`: {method.description}." for name, method in METHODS.items() if name in methods]
    return "\n".join(f"* {line}" for line in lines)


def _quality_notes(report: Record, config: EvaluationConfig) -> list[str]:
    references, text, fidelity = report["references"], config.text, config.fidelity
    joint, independent, ppl = references["joint"], references["joint_independent"], report["gen_ppl_again"]
    return [
        f"Texts continue {text.prompts} held-out prompts of {text.prompt_tokens} tokens by {text.new_tokens} tokens. The AR "
        f"model's text under other noise has NLL {interval(references['nll'])} and entropy {value(references['entropy'])}"
        + (f", and Gen-PPL {interval(ppl, 1)}" if ppl else "")
        + ". NLL and Gen-PPL are two-sided: when they are lower than those of AR and the entropy is lower as well, the "
        "decoder has collapsed towards modes and is not better.",
        "`joint TV` is the total variation between a decoder's next four tokens and the AR model's, in "
        f"{fidelity.buckets}⁴ hashed cells, from {fidelity.samples:,} samples after each of {fidelity.contexts} prompts from "
        f"{joint['documents']} documents. Between two samples of the AR model it is {interval(joint['tv'], 3)}; for "
        f"independent draws from the AR model's marginals it is {interval(independent['tv'], 3)}, which is "
        f"{interval(independent['excess'], 3)} more.",
        "`beyond two AR samples` subtracts the total variation of two AR samples for each context. Contexts differ more "
        "than decoders do, so use this column to compare decoders.",
        "`distinct-2` is one figure for all texts together and has no interval.",
        "`tokens until it leaves AR's text` counts the first tokens that equal the AR model's under the same noise. For "
        "decoders that verify it is the whole text.",
    ]


def reported_table(config: EvaluationConfig) -> str:
    """The paper's own figures, which were not measured here."""
    protocols = [config.text.protocol] if config.text.protocol else list(REPORTED)
    what = "for another protocol, another model and another machine. Do not compare them line by line"
    if config.text.protocol:
        what = (
            "for the same lengths of prompts and texts and the same truncation, but another model and another machine"
        )
        if config.text.external != GPT2_LARGE:
            what += f"; Gen-PPL here is by {config.text.external}"
    head = ["reported", "corpus", "passes a token", "Gen-PPL, GPT-2-Large", "wins against AR"]
    rows = [
        [f"*{name}*", protocol, *(f"*{x}*" for x in figures)]
        for protocol in protocols
        for name, *figures in REPORTED[protocol]
    ]
    table = markdown_table([*head, "thousand tokens/s, batch 16, H100"], rows)
    return f"Reported by the paper and not run here. These figures are {what}.\n\n{table}"
