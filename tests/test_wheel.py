"""The wheel in an environment of its own: the bare install generates text, and names the extra that a command needs."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import textwrap
from pathlib import Path

import pytest

from kforcing import LLM, SamplingParams

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
ABSENT = ("ray", "deepspeed", "mlflow", "datasets", "fastapi", "sklearn")
GENERATE = """
    import importlib.util, json, sys
    from kforcing import LLM, SamplingParams
    params = SamplingParams(max_tokens=12, temperature=1.0, seed=3, ignore_eos=True)
    (answer,) = LLM(sys.argv[1]).generate("Fellow citizens", params)
    found = [name for name in sys.argv[2:] if importlib.util.find_spec(name)]
    print(json.dumps({"tokens": answer.outputs[0].token_ids, "text": answer.outputs[0].text, "found": found}))
"""


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """The programs of a new environment with torch and the project's wheel, and without any extra."""
    folder = tmp_path_factory.mktemp("clean")
    sources = folder / "sources"  # a build writes beside the sources
    for name in ("kforcing", "pipelines", "serve"):
        shutil.copytree(ROOT / name, sources / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, sources)
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True, timeout=300)
    programs = folder / "venv" / "bin"
    for what in ("torch==2.13.0", str(sources)):
        line = [programs / "python", "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", what]
        done = subprocess.run(line, capture_output=True, text=True, timeout=1500)
        assert done.returncode == 0, done.stderr[-3000:]
    return programs


def run(line, cwd):
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(line, capture_output=True, text=True, cwd=cwd, env=env, timeout=300)


def test_the_bare_install_generates_the_same_text(clean, tmp_path):
    with tarfile.open(ROOT / "tests" / "data" / "finished_run.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    student = tmp_path / "runs" / "tiny" / "k2"
    done = run([clean / "python", "-c", textwrap.dedent(GENERATE), student, *ABSENT], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    params = SamplingParams(max_tokens=12, temperature=1.0, seed=3, ignore_eos=True)
    (here,) = LLM(student).generate("Fellow citizens", params)
    expected = {"tokens": here.outputs[0].token_ids, "text": here.outputs[0].text, "found": []}
    assert len(expected["tokens"]) == 12
    assert json.loads(done.stdout.splitlines()[-1]) == expected


def test_the_wheel_holds_the_endpoints_page(clean):
    (installed,) = clean.parent.glob("lib/python*/site-packages/serve/page")
    here = {file.name: file.read_bytes() for file in (ROOT / "serve" / "page").iterdir()}
    assert {file.name: file.read_bytes() for file in installed.iterdir()} == here


@pytest.mark.parametrize(("command", "extra"), [("distill", "train"), ("evaluate", "eval"), ("serve", "serve")])
def test_a_command_names_the_extra_that_it_needs_in_one_line(clean, tmp_path, command, extra):
    done = run([clean / "kforcing", command], tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: `kforcing {command}` needs ray, ")
    assert line.endswith(f"pip install 'kforcing[{extra}]'")
