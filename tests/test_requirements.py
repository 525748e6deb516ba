"""Every library that the project imports is declared in `pyproject.toml`, by the extra whose users need it."""

import re
import sys
from pathlib import Path

import pytest

from tests.test_layers import PACKAGES, imported

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = {  # path → the extras that its users install; the longest path that fits counts
    "kforcing/": (),
    "kforcing/metrics/mauve.py": ("eval",),  # imports scikit-learn when it is called, for evaluations alone
    "kforcing/structured.py": ("structured",),  # imports llguidance when it is called
    "kforcing/remote.py": ("remote",),  # imports pyarrow when it is called
    "kforcing/cpu/": ("cpu",),  # does without llvmlite where it is not installed
    "pipelines/": ("train",),
    "pipelines/evaluation/": ("eval",),
    "serve/": ("serve",),
    "tests/": ("dev",),
}
DISTRIBUTIONS = {"yaml": "pyyaml", "sklearn": "scikit-learn", "prometheus_client": "prometheus-client"}
"""Module → name of the distribution that holds it, where the two differ."""


def declared(extras) -> set[str]:
    """Names of the bare requirements and of those of some extras, with the extras that these name in turn."""
    names, todo = (
        set(),
        [*PROJECT["dependencies"], *(line for e in extras for line in PROJECT["optional-dependencies"][e])],
    )
    for line in todo:
        name, inner = re.match(r"([\w.-]+)(?:\[([\w,-]+)\])?", line).groups()
        if name == PROJECT["name"]:
            names |= declared(inner.split(","))
        else:
            names.add(name.lower())
    return names


def libraries(file) -> set[str]:
    """Distributions of the third-party modules that a file imports."""
    top = {name.split(".")[0] for name in imported(file)} - set(sys.stdlib_module_names) - {*PACKAGES, "tests"}
    return {DISTRIBUTIONS.get(name, name) for name in top}


@pytest.mark.parametrize("place", EXTRAS)
def test_all_that_is_imported_is_declared(place):
    missing = {}
    for file in [ROOT / place] if place.endswith(".py") else (ROOT / place).rglob("*.py"):
        path = file.relative_to(ROOT).as_posix()
        if max((p for p in EXTRAS if path.startswith(p)), key=len) == place:
            found = libraries(file) - declared(EXTRAS[place])
            missing |= {path: found} if found else {}
    assert missing == {}


def test_extras_hold_what_they_name_in_turn():
    assert {"ray", "openai", "torch", "scikit-learn"} <= declared(["dev"])
    assert not {"ray", "deepspeed", "mlflow", "pydantic"} & declared([])
