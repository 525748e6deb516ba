"""The image, as far as its file tells: no Docker is needed here."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.infra.manifests import INFRA, ROOT

FILE = INFRA / "Dockerfile"
ARGS = dict(re.findall(r"^ARG (\w+)=(\S+)$", FILE.read_text(), re.M))
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.M))


def instructions():
    """(word, rest) of every instruction, with continued lines joined."""
    text = re.sub(r"\\\n\s*", " ", re.sub(r"^#.*\n", "", FILE.read_text(), flags=re.M))
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line]


def stages():
    """(name, base, its instructions) of every stage, in order; the last one is the image."""
    found = []
    for word, rest in instructions():
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            found.append((name, base, []))
        elif found:
            found[-1][2].append((word, rest))
    return found


def base_of(base, variant):
    """A base with its arguments filled in."""
    return base.replace("${PYTHON}", ARGS["PYTHON"]).replace("${VARIANT}", variant)


@pytest.mark.cluster
def test_the_linter_finds_nothing():
    linter = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([linter, FILE], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("", 0)


@pytest.mark.parametrize("variant", ["cpu", "cuda"])
def test_every_base_is_a_stage_or_pinned_to_a_patch_release(variant):
    names = {name for name, _, _ in stages()}
    outside = {base_of(base, variant) for _, base, _ in stages()} - names
    assert outside == {"python:3.11.14-bookworm", "python:3.11.14-slim-bookworm"}
    assert f"torch-{variant}" in names


def test_the_cpu_image_is_the_default():
    assert ARGS["VARIANT"] == "cpu"


def test_it_copies_what_exists_and_what_the_builder_is_sent():
    sent = {line[1:] for line in FILE.with_name("Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"}
    copied = {
        source
        for word, rest in instructions()
        if word == "COPY" and not rest.startswith("--from=")
        for source in rest.split()[:-1]
    }
    assert all((ROOT / source).exists() for source in copied)
    assert copied == sent


def test_it_takes_what_earlier_stages_have_made():
    names = [name for name, _, _ in stages()]
    taken = [rest.split()[0].removeprefix("--from=") for word, rest in stages()[-1][2] if "--from=" in rest]
    assert taken == ["build"]
    assert set(taken) <= set(names)


def test_it_installs_within_the_constraints():
    lines = [rest for word, rest in instructions() if word == "RUN" and "pip install" in rest]
    assert len(lines) == 3
    for line in lines:
        assert "-c constraints.txt" in line
        for name, version in re.findall(r"([\w-]+)==([\d.]+)", line):
            assert PINS[name] == version
    assert "'.[train,serve]' boto3" in lines[-1]
    assert "boto3" in PINS
    makefile = re.search(r"torch==([\d.]+)$", (ROOT / "Makefile").read_text(), re.M)[1]
    assert makefile == PINS["torch"]


def test_it_has_no_build_tools():
    _, base, own = stages()[-1]
    assert "-slim-" in base
    installed = [rest for word, rest in own if word == "RUN" and "apt-get install" in rest]
    assert re.findall(r"--no-install-recommends ([\w\s-]+?) &&", installed[0]) == ["wget"]
    assert len(installed) == 1
    assert not any("pip install" in rest for word, rest in own if word == "RUN")


def test_it_does_not_run_as_root():
    user = [rest for word, rest in stages()[-1][2] if word == "USER"]
    assert user == ["1000:1000"]
    assert stages()[-1][2][-1][0] == "USER"


def test_it_holds_no_secret():
    assert not re.search(r"PASSWORD|SECRET|TOKEN|API_KEY", FILE.read_text())
