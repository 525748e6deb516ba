"""Read Markdown pages: fenced blocks, shell lines, links, tables, trees."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / name
    for name in (
        "README.md",
        "kforcing/README.md",
        "pipelines/README.md",
        "serve/README.md",
        "infra/README.md",
        ".ci/CONTRIBUTING.md",
    )
]


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str
    language: str
    text: str


def blocks(page: Path, *languages: str) -> list[Block]:
    """The fenced blocks of a page in these languages."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.M | re.S)
    return [Block(str(page.relative_to(ROOT)), name, text) for name, text in found if name in languages]


def shell_commands(page: Path) -> list[list[str]]:
    """The commands of a page as words: lines of `sh` blocks, lines of `console` blocks that begin with `$`."""
    lines = []
    for block in blocks(page, "sh", "console"):
        text = block.text.replace("\\\n", " ")
        lines += [
            line.removeprefix("$ ") for line in text.splitlines() if block.language == "sh" or line.startswith("$ ")
        ]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def links(page: Path) -> list[str]:
    """Targets of the links of a page that lead to files of the project."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    return [target for target in re.findall(r"\]\(([^)]+)\)", prose) if "://" not in target]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def table_keys(page: Path, heading: str) -> list[str]:
    """The names in backticks in the first column of the first table behind a heading."""
    text = page.read_text().split(f"\n## {heading}\n", 1)[1].split("\n## ")[0]
    cells = [row.split("|")[1] for row in re.findall(r"^\|.*\|$", text, re.M)]
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


def tree_paths(text: str) -> list[str]:
    """The paths of an indented tree whose folders end in a slash; what follows two spaces is a comment."""
    paths, folders = [], [(-1, "")]
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        for name in re.split(r"  ", line.strip())[0].split():
            while folders[-1][0] >= indent:
                folders.pop()
            paths.append(folders[-1][1] + name)
            if name.endswith("/"):
                folders.append((indent, folders[-1][1] + name))
    return paths
