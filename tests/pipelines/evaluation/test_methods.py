"""The table METHODS: every module of `kforcing.baselines` is trained and decoded by an evaluation."""

import importlib
import pkgutil

import pytest

from kforcing import baselines
from pipelines.evaluation import baselines as table
from pipelines.evaluation.baselines import METHODS

MODULES = [module.name for module in pkgutil.iter_modules(baselines.__path__) if module.name != "base"]


def modules_behind(call):
    """The module of a function or class, and those of all that a function of the table's own module refers to."""
    call = getattr(call, "func", call)  # of a partial
    found = {call.__module__}
    if call.__module__ == table.__name__ and hasattr(call, "__code__"):
        named = [call.__globals__.get(name) for name in call.__code__.co_names]
        found |= set().union(*(modules_behind(other) for other in named if hasattr(other, "__module__")))
    return found


def modules_of(method):
    """The modules that an entry of the table uses to build, train or decode."""
    calls = [method.build, method.step, *method.decoders.values()]
    return set().union(*(modules_behind(call) for call in calls if call is not None))


@pytest.mark.parametrize("module", MODULES)
def test_every_baseline_is_in_the_table(module):
    name = f"kforcing.baselines.{module}"
    importlib.import_module(name)
    assert [key for key, method in METHODS.items() if name in modules_of(method)]


@pytest.mark.parametrize("key", METHODS)
def test_every_entry_is_described_and_has_rows(key):
    method = METHODS[key]
    rows = method.rows(4, [1, 2, 4], "gumbel")
    assert method.description
    assert method.label
    assert {row.method for row in rows} == {key}
    assert {row.decoder for row in rows} <= {"engine", "assisted", *method.decoders}
