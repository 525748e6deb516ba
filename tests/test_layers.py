"""Which package may import which library and which other package, and that no import leads back to where it began."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("kforcing", "pipelines", "serve")
FORBIDDEN = {
    "kforcing": {"ray", "deepspeed", "mlflow", "pipelines", "serve"},
    "pipelines": {"serve"},
    "serve": {"pipelines"},
}
ONLY_IN = {
    "deepspeed": ("pipelines/training/deepspeed_engine.py",),
    "mlflow": ("pipelines/tracking/", "serve/models.py"),
}
LOWEST = {  # modules of `kforcing` that others build on may import these modules of it, and no others
    "kforcing.device": set(),
    "kforcing.keys": set(),
    "kforcing.noise": {"kforcing.keys"},
    "kforcing.backbone": set(),
    "kforcing.cpu.compiler": set(),
    "kforcing.cpu.race": {"kforcing.cpu.compiler", "kforcing.noise"},
    "kforcing.coupling": {"kforcing.noise", "kforcing.cpu.race"},
    "kforcing.design": {"kforcing.coupling"},
}


@cache
def modules() -> dict[str, Path]:
    files = [file for package in PACKAGES for file in (ROOT / package).rglob("*.py")]
    return {".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f for f in files}


def imported(file: Path) -> set[str]:
    """Full names of all that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


@cache
def graph() -> dict[str, set[str]]:
    """Module of the project → modules of the project that it imports.

    `from a.b import c` is an import of the module `a.b.c` where there is one, and of `a.b` otherwise.
    """
    known = modules()
    edges = {}
    for name, file in known.items():
        found = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                whole = [f"{node.module}.{alias.name}" for alias in node.names]
                found |= {full if full in known else node.module for full in whole}
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
        edges[name] = {other for other in found if other in known and other != name}
    return edges


def cycle_from(start: str) -> list[str] | None:
    """A path of imports that leads from a module back to it, if there is one."""
    paths = [[start]]
    seen = {start}
    while paths:
        path = paths.pop()
        for other in graph()[path[-1]]:
            if other == start:
                return [*path, start]
            if other not in seen:
                seen.add(other)
                paths.append([*path, other])
    return None


def test_no_import_leads_back_to_where_it_began():
    assert [cycle for name in graph() if (cycle := cycle_from(name))] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_what_it_may(package):
    for name, file in modules().items():
        if name.split(".")[0] == package:
            assert not FORBIDDEN[package] & {full.split(".")[0] for full in imported(file)}, file


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_library_has_one_home(library):
    users = {
        file.relative_to(ROOT).as_posix()
        for file in modules().values()
        if library in {full.split(".")[0] for full in imported(file)}
    }
    assert {user for user in users if not user.startswith(ONLY_IN[library])} == set()
    assert all(any(user.startswith(home) for user in users) for home in ONLY_IN[library])


@pytest.mark.parametrize("module", LOWEST)
def test_the_lowest_modules_import_nothing_above_them(module):
    assert graph()[module] <= LOWEST[module]


@pytest.mark.parametrize("module", ["pipelines.training.row_source", "pipelines.training.relay"])
def test_what_ray_imports_in_its_own_processes_needs_no_torch(module):
    """The controller of Ray Train, and the processes that plan, split and read a dataset: each would wait for seconds."""
    code = f"import sys, {module}; print(*{{'torch', 'transformers', 'deepspeed', 'mlflow'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (done.stdout.strip(), done.stderr) == ("", "")


def test_no_module_changes_the_import_path():
    assert [file for file in modules().values() if "sys.path" in file.read_text()] == []


def test_nothing_refers_to_absolute_paths():
    for file in modules().values():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not node.value.startswith(("/home/", "/root/", "/tmp/")), (file, node.value)
