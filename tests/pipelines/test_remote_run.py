"""A whole run in object storage: the weights of a local one, through faults, a killed driver and another machine."""

import json
import re
import subprocess
import time

import pytest

from kforcing import LLM, SamplingParams
from kforcing.remote import listing, read_bytes
from pipelines.failures import Exit
from pipelines.storage import LEASE_S
from tests.pipeline_runs import LONG_K2, command, environment, run_command
from tests.waiting import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.cluster]


def test_a_run_in_object_storage_gives_the_weights_of_a_local_one_and_goes_on_on_another_machine(
    smoke, store, tmp_path
):
    """The server fails every tenth request. The first driver is killed in the middle of k4."""
    uri, faults = store
    faults.fail_every(10)
    line = command("distill.py", "--recipe", "smoke", LONG_K2, f"output_dir={uri}/runs/a", "train.checkpoint_every=4")
    first, second = ({"XDG_CACHE_HOME": str(tmp_path / name)} for name in ("machine 1", "machine 2"))
    output = tmp_path / "output.txt"
    with open(output, "w") as file:
        process = subprocess.Popen(line, stdout=file, stderr=subprocess.STDOUT, cwd=tmp_path, env=environment(**first))
        wait_until(lambda: re.search(r"k4 +step 8/24", output.read_text()) or process.poll(), output.read_text, 900)
        process.kill()
        assert process.wait(timeout=60) < 0, output.read_text()
    assert "k4/manifest.json" not in listing(f"{uri}/runs/a")
    busy = run_command(line, tmp_path, **second)
    assert (busy.returncode, "is in use by another run" in busy.stderr) == (Exit.BUSY, True), busy.stderr
    time.sleep(LEASE_S + 5)
    done = run_command(line, tmp_path, timeout=900, **second)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(f"{name}  finished before, skipped" in done.stdout for name in ("teacher", "k1", "k2"))
    assert int(re.search(r"k4 +step (\d+)/24", done.stdout)[1]) > 4, "from a checkpoint, not from the start"
    for name in ("teacher", "k1", "k2", "k4"):
        theirs = read_bytes(f"{uri}/runs/a/{name}/model.safetensors")
        assert theirs == (smoke[0] / name / "model.safetensors").read_bytes(), name
    report = json.loads(read_bytes(f"{uri}/runs/a/report.json"))
    assert report["stages"][-1]["path"] == f"{uri}/runs/a/k4"
    assert faults.failed > 50
    paths = report["stages"][-1]["path"], smoke[0] / "k4"
    texts = [LLM(path).generate("Fellow citizens", SamplingParams(seed=1))[0].outputs[0].text for path in paths]
    assert texts[0] == texts[1]
