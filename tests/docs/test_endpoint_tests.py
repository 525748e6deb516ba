"""The tables of serve/ENDPOINT_TESTS.md and tests/chaos/README.md name tests that exist."""

import re

from tests.docs.pages import ROOT

PAGE = ROOT / "serve" / "ENDPOINT_TESTS.md"


def test_every_test_that_the_tables_name_exists():
    rows = [
        row for row in re.findall(r"^\|.*\|$", PAGE.read_text(), re.M) if "---" not in row and "| tests |" not in row
    ]
    assert len(rows) > 30
    for row in rows:
        named = re.findall(r"`([\w/]+\.py)::(\w+)`", row)
        assert named or "serve.overhead" in row, row
        for file, test in named:
            path = ROOT / (file if "/" in file else f"tests/serve/{file}")
            assert f"\ndef {test}(" in path.read_text(), f"{file}::{test}"


def test_the_table_of_faults_names_tests_that_exist():
    page = (ROOT / "tests" / "chaos" / "README.md").read_text()
    rows = re.findall(r"^\|.*\|$", page[page.index("## In `make test`") :], re.M)[2:]
    named = [re.search(r"\| `([\w/]+\.py)::(\w+)` \|$", row) for row in rows]
    assert len(rows) >= 12
    for row, found in zip(rows, named, strict=True):
        assert found or row.endswith("| the same |"), row
        assert not found or f"\ndef {found[2]}(" in (ROOT / "tests" / found[1]).read_text(), row
