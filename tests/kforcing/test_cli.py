"""The command `kforcing`: each subcommand is its script, and what is missing is named."""

import importlib.util
import subprocess
import sys

import pytest

from kforcing import cli
from tests.endpoint import save_model


@pytest.mark.parametrize("module", [module for module, _, _ in cli.COMMANDS.values()])
def test_every_command_has_a_module(module):
    assert importlib.util.find_spec(module) is not None


def test_an_unknown_command_names_those_that_there_are(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["kforcing", "destill"])
    with pytest.raises(
        SystemExit, match="unknown command 'destill'; choose one of distill, evaluate, generate, serve, benchmark"
    ):
        cli.main()


def test_a_missing_package_names_the_extra_that_brings_it(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["kforcing", "distill"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "deepspeed" else name)
    with pytest.raises(SystemExit, match=r"`kforcing distill` needs deepspeed; .*pip install 'kforcing\[train\]'"):
        cli.main()


def test_help_shows_the_commands(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["kforcing"])
    cli.main()
    assert "kforcing distill --recipe smoke" in capsys.readouterr().out


@pytest.mark.cluster
@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help(command):
    done = subprocess.run(
        [sys.executable, "-m", "kforcing.cli", command, "--help"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout.lower()


@pytest.mark.cluster
def test_generate_completes_a_file_of_prompts(tmp_path):
    save_model(tmp_path / "k4")
    (tmp_path / "prompts.txt").write_text("abc\nde\n")
    words = ["generate", "k4", "prompts.txt", "--max-new-tokens", "5"]
    done = subprocess.run(
        [sys.executable, "-m", "kforcing.cli", *words], capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2
