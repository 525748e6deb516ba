import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    "kforcing": {"ray", "deepspeed", "mlflow", "pipelines", "serve"},
    "pipelines": {"serve"},
    "serve": {"pipelines"},
}
ONLY_IN = {"deepspeed": {"pipelines/strategy.py"}, "mlflow": {"pipelines/tracking.py", "serve/models.py"}}


def imports(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("package", FORBIDDEN)
def test_packages_import_only_what_they_may(package):
    for file in (ROOT / package).rglob("*.py"):
        assert not FORBIDDEN[package] & set(imports(file)), file


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_library_has_one_home(library):
    users = {
        f.relative_to(ROOT).as_posix() for p in FORBIDDEN for f in (ROOT / p).rglob("*.py") if library in imports(f)
    }
    assert users == ONLY_IN[library]


def test_nothing_refers_to_absolute_paths():
    for package in FORBIDDEN:
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    assert not node.value.startswith(("/home/", "/root/", "/tmp/")), (file, node.value)
