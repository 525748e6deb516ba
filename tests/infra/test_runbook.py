"""The runbook is true: the code says every message that it quotes, exports every metric, and has every alert."""

import ast
import re

import pytest

from tests.infra.manifests import INFRA, ROOT

TEXT = (INFRA / "RUNBOOK.md").read_text()
GAP = "…"


def rows():
    """The rows of every table as dictionaries by the names of its columns."""
    for table in re.findall(r"(?:^\|.*\|\n)+", TEXT, re.M):
        head, _, *body = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()]
        yield from (dict(zip((name.strip("| ") for name in head), row, strict=True)) for row in body)


def quoted():
    """The messages that the runbook quotes: what stands in backticks in a column `message`, without paths and fields."""
    for row in rows():
        for text in re.findall(r"`([^`]+)`", row.get("message", "")):
            if " " in text and not text.startswith("GET "):
                yield text


def template(node):
    """A string of the code, with a gap for each value; None for other nodes."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else GAP for part in node.values)
    return None


@pytest.fixture(scope="module")
def messages():
    """Every string of the code that is not a docstring."""
    found = set()
    for package in ("kforcing", "pipelines", "serve"):
        for file in (ROOT / package).rglob("*.py"):
            tree = ast.parse(file.read_text())
            documentation = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
            found |= {template(node) for node in ast.walk(tree) if id(node) not in documentation}
    return found - {None}


def said(message, messages):
    pattern = re.compile(".*?".join(re.escape(part) for part in message.split(GAP)), re.S)
    return any(pattern.search(text) for text in messages)


@pytest.mark.parametrize("message", quoted())
def test_the_code_says_the_message(message, messages):
    assert said(message, messages)


def test_a_message_that_the_code_does_not_say_is_found_out(messages):
    assert not said("the waiting queue is empty: … requests wait", messages)
    assert len(list(quoted())) >= 25


def test_every_alert_is_in_the_runbook_and_every_one_there_exists():
    named = set(re.findall(r"- alert: (\w+)", (INFRA / "alerts.yaml").read_text()))
    assert set(re.findall(r"`(Kforcing\w+)`", TEXT)) == named


def test_every_metric_of_the_runbook_is_on_a_dashboard_or_in_an_alert():
    shown = "".join((INFRA / name).read_text() for name in ("grafana.json", "grafana-pipeline.json", "alerts.yaml"))
    for name in re.findall(r"`((?:ray_)?kforcing_\w+)`", TEXT):
        assert re.search(rf"\b{name}\b", shown), name
