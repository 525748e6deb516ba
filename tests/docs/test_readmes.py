"""The pages are true: the program that a command names accepts it, every snippet runs, every link leads somewhere.

`EXTERNAL` lists the programs of other people, whose command lines are not parsed here.
"""

import argparse
import importlib
import json
import re
import runpy
import shlex
import subprocess
import sys

import pytest
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig

from kforcing import loading
from pipelines.config.command_line import read_command_line
from pipelines.config.recipes import RECIPES
from pipelines.distill import read_plan_options
from pipelines.evaluation.config import evaluation_config
from pipelines.evaluation.plan import methods_of
from serve.protocol.requests import CompletionRequest
from serve.settings import Settings, read_settings
from tests.docs.pages import PAGES, ROOT, anchors, blocks, links, shell_commands, table_keys, tree_paths
from tests.endpoint import LETTERS, endpoint, save_model
from tests.models import CONFIGS, make_sequential

README, KFORCING, PIPELINES, SERVE, INFRA, CONTRIBUTING = PAGES
EXTERNAL = {"git", "pip", "docker", "kubectl", "guidellm", "aiperf", "lm_eval", "schemathesis", "."}
"""Programs of other people: only the files of the project that they are given are checked."""

LOG = ROOT / "LOG.md"
COMMANDS = [(str(page.relative_to(ROOT)), words) for page in PAGES for words in shell_commands(page)]
COMMANDS += [("LOG.md", shlex.split(line)) for line in re.findall(r"`(python [^`]+)`", LOG.read_text())]


class Parsed(Exception):
    """An entry point has read its command line, and would now begin to work."""


def backbone_of(layers):
    """A tiny AR model with as many positions as the pages ask for."""
    config = LlamaConfig(**CONFIGS["llama"].to_dict() | {"num_hidden_layers": layers, "max_position_embeddings": 2048})
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working directory with what the pages take for granted: a run, a teacher, prompts, a config file."""
    folder = tmp_path_factory.mktemp("reader")
    run = folder / "runs" / "quickstart"
    save_model(run / "k4", make_sequential(backbone_of(layers=2)), chat=True)
    (run / "run.json").write_text('{"recipe": "quickstart"}')
    save_model(folder / "models" / "Qwen3-0.6B", backbone_of(layers=4))
    (folder / "prompts.txt").write_text("a b c\nd e f\n")
    (page,) = blocks(PIPELINES, "yaml")
    (folder / "mine.yaml").write_text(page.text)
    return folder


@pytest.fixture
def reader(folder, monkeypatch):
    """The current directory is the reader's, and entry points stop once their command line is read."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for name in ("parse_args", "parse_intermixed_args"):
        original = getattr(argparse.ArgumentParser, name)

        def stop(self, *args, original=original):
            raise Parsed(original(self, *args))

        monkeypatch.setattr(argparse.ArgumentParser, name, stop)
    return folder


def read_words(monkeypatch, words, run):
    """Let an entry point read its words; its mistakes and `--help` leave by SystemExit."""
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises((Parsed, SystemExit)) as stopped:
        run()
    if stopped.type is SystemExit:
        assert "--help" in words, f"{shlex.join(words)}: {stopped.value}"
        assert stopped.value.code == 0


def check_settings(words):
    read_settings(dict(word.split("=", 1) for word in words))


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=[f"{page}: {shlex.join(words)}" for page, words in COMMANDS])
def test_command_is_accepted(page, words, reader, monkeypatch):
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    if words[:3] == ["ray", "job", "submit"]:
        words = words[words.index("--") + 1 :]
    program, rest = words[0], words[1:]
    if program == "make":
        done = subprocess.run(["make", "-n", *rest], cwd=ROOT, capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, done.stderr
    elif words[:3] == ["serve", "run", "serve.app:build"]:
        check_settings(words[3:])
    elif words[:2] == ["serve", "deploy"]:
        application = yaml.safe_load((ROOT / words[2]).read_text())["applications"][0]
        read_settings(application["args"])
    elif words[:2] == ["python", "-m"]:
        read_words(monkeypatch, words[2:], lambda: runpy.run_module(words[2], run_name="__main__"))
    elif program == "python":
        read_words(monkeypatch, words[1:], lambda: runpy.run_path(str(ROOT / words[1]), run_name="__main__"))
    elif program == "kforcing":
        check_console(monkeypatch, words)
    elif program == "curl":
        pass  # runs in `test_curl_lines_are_answered`
    elif program == "pytest":
        assert all((ROOT / word).exists() for word in rest if word.startswith("tests"))
    else:
        assert program in EXTERNAL, f"{page}: nothing checks {shlex.join(words)}; add a check, or name it EXTERNAL"
        for word in rest:
            if word.startswith(("infra/", "tests/")):
                assert (ROOT / word).exists(), word


def check_console(monkeypatch, words):
    """A console command dispatches to the entry point of pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text()
    module, function = re.search(r'^kforcing = "([\w.]+):(\w+)"$', text, re.M).groups()
    if words[1] == "serve":
        return check_settings([word for word in words[2:] if "=" in word])
    read_words(monkeypatch, words, getattr(importlib.import_module(module), function))


LINES = sorted({shlex.join(words) for page, words in COMMANDS if page != "LOG.md"})
DISTILL = [line for line in LINES if re.search(r"(pipelines/|kforcing )distill", line) and "--help" not in line]
EVALUATE = [line for line in LINES if re.search(r"(pipelines/|kforcing )evaluate", line) and "--help" not in line]


def options_of(line, name):
    """The words behind the name of a program."""
    words = shlex.split(line)
    return words[next(i for i, word in enumerate(words) if word in (name, f"pipelines/{name}.py")) + 1 :]


@pytest.mark.parametrize("line", DISTILL)
def test_distill_line_passes_validation(line, folder, monkeypatch):
    monkeypatch.chdir(folder)
    # The wheel of SmolLM2 need not be installed.
    monkeypatch.setattr(
        loading, "locate_model", lambda name: ("models/Qwen3-0.6B" if name == "smollm2" else name, None)
    )
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    line = line.replace("/shared/models/", "models/").replace("models/MINE", "models/Qwen3-0.6B")
    _, words = read_plan_options(options_of(line, "distill"))
    assert read_command_line("", words).recipe in RECIPES


@pytest.mark.parametrize("line", EVALUATE)
def test_evaluate_line_passes_validation(line):
    fields = [word for word in options_of(line, "evaluate") if "=" in word]
    assert methods_of(evaluation_config(fields)) is not None


PYTHON = [
    pytest.param(page, id=str(page.relative_to(ROOT)), marks=[pytest.mark.cluster] if page == SERVE else [])
    for page in PAGES
    if blocks(page, "python")
]


@pytest.mark.parametrize("page", PYTHON)
def test_python_snippets_run(page, folder, monkeypatch, capsys):
    """The snippets of a page run one after the other in one namespace, against a tiny student or its endpoint."""
    monkeypatch.chdir(folder)
    text = "\n".join(block.text for block in blocks(page, "python"))
    if "localhost:8000" not in text:
        exec(compile(text, str(page), "exec"), {})
    else:
        with endpoint(folder / "runs" / "quickstart" / "k4") as (url, _):
            text = text.replace("http://localhost:8000", url).replace('"k4"', '"tiny"')
            exec(compile(text, str(page), "exec"), {})
    assert set(capsys.readouterr().out) & set(LETTERS)


@pytest.mark.cluster
def test_curl_lines_are_answered(folder):
    lines = [words for page in PAGES for words in shell_commands(page) if words[0] == "curl"]
    assert lines
    with endpoint(folder / "runs" / "quickstart" / "k4") as (url, _):
        for words in lines:
            words = [word.replace("http://localhost:8000", url) for word in words]
            done = subprocess.run(words, capture_output=True, text=True, timeout=30)
            assert json.loads(done.stdout)["choices"][0]["text"], done.stdout + done.stderr


@pytest.mark.parametrize("page", [*PAGES, LOG], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page):
    for target in links(page):
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_readme_fits_its_limit():
    assert len(README.read_text().splitlines()) <= 150


def test_trees_name_what_exists():
    trees = [block for page in PAGES for block in blocks(page, "text")]
    assert trees
    for block in trees:
        base = (ROOT / block.page).parent
        for path in tree_paths(block.text):
            assert (base / path).exists(), f"{block.page}: {path}"


def test_recipes_table_names_every_recipe():
    assert sorted(table_keys(PIPELINES, "Recipes")) == sorted(RECIPES)


def test_settings_table_names_every_setting():
    assert sorted(table_keys(SERVE, "Settings")) == sorted(Settings.model_fields)


def test_alerts_table_names_every_alert():
    groups = yaml.safe_load((ROOT / "infra" / "alerts.yaml").read_text())["groups"]
    assert table_keys(INFRA, "Alerts") == [rule["alert"] for group in groups for rule in group["rules"]]


def test_features_table_names_every_field_of_a_request():
    named = set(table_keys(SERVE, "Features")) | {"include_usage", "continuous_usage_stats"}
    known = set(CompletionRequest.model_fields) - {"model", "prompt", "user", "metadata"}
    assert known <= named, known - named


def test_log_index_names_every_entry_in_order():
    text = LOG.read_text()
    entries = re.findall(r"^## (\d{4}-\d\d-\d\d) · (.*)$", text, re.M)
    assert re.findall(r"^\* (\d{4}-\d\d-\d\d) \[(.*)\]\(#", text, re.M) == entries
    assert [date for date, _ in entries] == sorted((date for date, _ in entries), reverse=True)
