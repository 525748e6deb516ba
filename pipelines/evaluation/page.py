"""`samples.html`: the AR model's text and a decoder's under the same noise, token by token, side by side.

A token that equals the AR model's at its place is plain while the texts are one; the first that differs is marked, and what
follows it is tinted: there the texts have gone different ways, and equal tokens are coincidence.
"""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

from pipelines.evaluation.baselines import Row
from pipelines.evaluation.measure import slug
from pipelines.evaluation.subject import Subject

SHOWN = 12
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem }
body { color: #1a1a1a; background: #fff }
h2 { font-size: 1rem; margin: 2.2rem 0 .4rem; font-weight: 600 }
h2 span { font-weight: 400; color: #555 }
table { border-collapse: collapse; width: 100%; table-layout: fixed }
th { text-align: left; font-weight: 600; width: 15rem }
td, th { vertical-align: top; padding: .35rem .7rem .35rem 0; border-top: 1px solid #ddd; overflow-wrap: anywhere }
td.n { width: 7rem; color: #555; font-variant-numeric: tabular-nums }
code { white-space: pre-wrap; font: 14px/1.5 ui-monospace, monospace }
.first { background: #b3261e; color: #fff; border-radius: 2px }
.after { background: #fdecea }
"""


def write_page(path: Path, subject: Subject, rows: list[Row], results: dict[str, Any], tokenizer: Any) -> None:
    """Write the page for the decoders that share the AR model's noise."""
    references = results["references"]
    shown = [row for row in rows if row.same_noise and row.decoder != "ar"]
    blocks = []
    for i, prompt in enumerate(references["prompts"][:SHOWN]):
        lines = []
        for coupling in dict.fromkeys(row.coupling for row in shown):
            theirs = references["texts"][coupling][i]
            label = coupling.replace("_", " ")
            lines.append(
                f"<tr><th>AR, {label}</th><td class=n></td><td><code>{_pieces(theirs, theirs, tokenizer)}</code></td></tr>"
            )
            for row in (r for r in shown if r.coupling == coupling):
                mine = results[f"row-{slug(row.name)}"]["tokens"][i]
                same = next((j for j, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b), len(theirs))
                lines.append(
                    f"<tr><th>{html.escape(row.name)}</th><td class=n>{same} of {len(theirs)}</td>"
                    f"<td><code>{_pieces(mine, theirs, tokenizer)}</code></td></tr>"
                )
        blocks.append(
            f"<h2>Prompt {i + 1} <span>{html.escape(' '.join(prompt.split()))}</span></h2>\n<table>\n"
            + "\n".join(lines)
            + "\n</table>"
        )
    title = f"{html.escape(subject.name)}: the same prompts under the same noise"
    path.write_text(
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>\n<h1>{title}</h1>\n"
        "<p>Each decoder against the AR model that draws by the same coupling. "
        "<code><span class=first>First token</span></code> that differs, "
        "<code><span class=after>what follows</span></code>; the number counts tokens before it. "
        "Decoders that verify never differ.</p>\n" + "\n".join(blocks) + "\n</html>\n"
    )


def _pieces(mine: list[int], theirs: list[int], tokenizer: Any) -> str:
    """Tokens as text, marked from the first difference on. Bytes of a character that spans tokens go with its last one."""
    same = next((j for j, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b), len(mine))
    parts = [("", mine[:same]), ("first", mine[same : same + 1]), ("after", mine[same + 1 :])]
    before, out = "", []
    done: list[int] = []
    for name, ids in parts:
        done = done + ids
        text = str(tokenizer.decode(done))
        if len(done) < len(mine):
            text = text.rstrip("\ufffd")  # a character whose last bytes are still to come
        piece = html.escape(text[len(before) :]).replace("\n", "⏎")
        before = text
        if piece:
            out.append(f"<span class={name}>{piece}</span>" if name else piece)
    return "".join(out)
