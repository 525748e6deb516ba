"""`samples.html`: the AR model's text and each decoder's under the same noise, side by side.

Tokens are plain up to the first one that differs from the AR model's. That token is marked, and all later ones are tinted,
because equal tokens after different contexts are a coincidence.
"""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

from pipelines.evaluation.decoders import MethodRow, slug
from pipelines.evaluation.subject import Subject
from pipelines.files import atomic_write

SHOWN = 12
"""Prompts on the page."""
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


def write_page(path: Path, subject: Subject, rows: list[MethodRow], results: dict[str, Any], tokenizer: Any) -> None:
    """Write the page for the decoders that read the same noise as the AR model."""
    shown = [row for row in rows if row.same_noise and row.decoder != "ar"]
    prompts = results["references"]["prompts"][:SHOWN]
    blocks = []
    for i, prompt in enumerate(prompts):
        title = f"<h2>Prompt {i + 1} <span>{html.escape(' '.join(prompt.split()))}</span></h2>"
        blocks.append("\n".join([title, "<table>", *_lines(i, shown, results, tokenizer), "</table>"]))
    title = f"{html.escape(subject.name)}: the same prompts under the same noise"
    atomic_write(
        path,
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>\n<h1>{title}</h1>\n"
        "<p>Each decoder is compared with the AR model that draws by the same coupling. "
        "<code><span class=first>This token</span></code> is the first that differs, and "
        "<code><span class=after>these tokens</span></code> follow it. The number counts the tokens before it. "
        "Decoders that verify never differ.</p>\n" + "\n".join(blocks) + "\n</html>\n",
    )


def _lines(prompt: int, rows: list[MethodRow], results: dict[str, Any], tokenizer: Any) -> list[str]:
    """The table's lines for one prompt: for each coupling the AR model, then the decoders that draw by it."""
    lines = []
    for coupling in dict.fromkeys(row.coupling for row in rows):
        theirs = results["references"]["texts"][coupling][prompt]
        texts = [(f"AR, {coupling.replace('_', ' ')}", theirs)]
        texts += [(r.name, results[f"row-{slug(r.name)}"]["tokens"][prompt]) for r in rows if r.coupling == coupling]
        for number, (name, mine) in enumerate(texts):
            same = f"{_same_tokens(mine, theirs)} of {len(theirs)}" if number else ""
            text = _marked(mine, theirs, tokenizer)
            lines.append(f"<tr><th>{html.escape(name)}</th><td class=n>{same}</td><td><code>{text}</code></td></tr>")
    return lines


def _same_tokens(mine: list[int], theirs: list[int]) -> int:
    """Number of tokens before the first difference."""
    return next((j for j, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b), len(mine))


def _marked(mine: list[int], theirs: list[int], tokenizer: Any) -> str:
    """Tokens as HTML, marked from the first difference on. A character of several tokens stands with its last token."""
    same = _same_tokens(mine, theirs)
    parts = [("", mine[:same]), ("first", mine[same : same + 1]), ("after", mine[same + 1 :])]
    before, out = "", []
    done: list[int] = []
    for name, ids in parts:
        done = done + ids
        text = str(tokenizer.decode(done))
        if len(done) < len(mine):
            text = text.rstrip("\ufffd")  # the last bytes of this character are in the next token
        piece = html.escape(text[len(before) :]).replace("\n", "⏎")
        before = text
        if piece:
            out.append(f"<span class={name}>{piece}</span>" if name else piece)
    return "".join(out)
