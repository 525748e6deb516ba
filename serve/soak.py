"""Mixed traffic on a real deployment for any number of minutes, with redeployments and a killed replica.

    python -m serve.soak --minutes 30 [--model DIR --other DIR] [--clients 8] [--port 8000]

Two models are served in turn under one application with two replicas; without --model, two tiny ones with random weights.
First each request is asked alone. Then clients send whole requests, streams, lists of prompts, chats and bad requests, and
leave some before their end, while models are redeployed, bad deployments are tried, and one replica is killed. In the end no
error may have come that was not intended, and every text must be that of the request alone. The last line is one JSON object;
the exit status is 1 if something was wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from serve.overhead import save_random, vocabulary_of
from serve.processes import replica_megabytes, replicas
from serve.soak_traffic import Endpoint, Traffic, cases, whole_texts

REPLICAS = 2
CASES = 80
"""Different requests."""
GROWTH = 1.1
"""By how much the memory of the replicas may grow between a third of the time and the end."""
REPLACED_S = 120
"""Seconds in which a killed replica must be replaced."""
SETTLED_S = 5
"""Seconds after which the proxy sends nothing to the killed one any more."""
TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"


def tiny_models(root: Path) -> list[Path]:
    """Save two students with random weights and a chat template."""
    sizes = {"vocab_size": 500, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    for seed, name in enumerate(("first", "second")):
        save_random(root / name, seed, TEMPLATE, **sizes, **heads)
    return [root / "first", root / "second"]


def application(model: Path, **settings: Any) -> Any:
    """What Serve deploys. Raises ValueError for what `build` refuses."""
    from serve.app import build

    given = {"model": str(model), "max_num_seqs": 8, "max_model_len": 256, "max_waiting": 500, "drain_s": 60}
    return build({**given, "min_replicas": REPLICAS, "max_replicas": REPLICAS, **settings})


class Deployments:
    """What is deployed: one of the models at a time, and now and then something that cannot be served."""

    def __init__(self, models: list[Path], root: Path, endpoint: Endpoint):
        self.models, self.root, self.endpoint = models, root, endpoint
        self.now = 0
        """The number of the model that is served."""
        self.counts = {"good": 0, "refused": 0, "failed": 0, "killed": 0}

    def deploy(self, model: Path, **settings: Any) -> None:
        """Deploy a model, and return when all replicas have it. Raises ValueError for what `build` refuses."""
        from ray import serve

        serve.run(application(model, **settings))

    def good(self) -> None:
        """The other model; every second time it is loaded after a drain."""
        self.now = 1 - self.now
        self.deploy(self.models[self.now], load_after_drain=self.counts["good"] % 2 == 1)
        self.counts["good"] += 1

    def refused(self) -> None:
        """A setting that `build` refuses."""
        try:
            self.deploy(self.models[self.now], k=99)
        except ValueError:
            self.counts["refused"] += 1

    def failed(self) -> None:
        """A model whose weights vanish between `build` and the replicas; the one before must be served on."""
        from ray import serve

        bad = Path(shutil.copytree(self.models[self.now], self.root / f"bad-{self.counts['failed']}"))
        checked = application(bad)
        shutil.rmtree(bad)
        serve.run(checked)
        status, text = self.endpoint.get("/health")
        self.counts["failed"] += status == 200 and "failed_deployment" in text

    def kill(self, traffic: Traffic) -> None:
        """Kill a replica, and wait until another one has taken its place."""
        traffic.excused_until = float("inf")
        before, deadline = replicas(), time.monotonic() + REPLACED_S
        os.kill(before[0], signal.SIGKILL)
        while not (replaced := self._replaced(before)) and time.monotonic() < deadline:
            time.sleep(0.5)
        self.counts["killed"] += replaced
        time.sleep(SETTLED_S)
        traffic.excused_until = time.monotonic()

    def _replaced(self, before: list[int]) -> bool:
        from ray import serve

        now, status = replicas(), serve.status().applications["default"]
        ready = status.deployments["kforcing"].replica_states.get("RUNNING", 0)
        return before[0] not in now and len(now) == ready == REPLICAS


def run(given: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Everything from the first deployment to the record of what happened."""
    endpoint = Endpoint(given.port)
    models = [Path(given.model), Path(given.other)] if given.model else tiny_models(root)
    deployments = Deployments(models, root, endpoint)
    expected: dict[str, list[list[str]]] = {}
    deployments.deploy(models[0])
    chat = '"chat_template": true' in endpoint.get("/v1/models")[1]
    asked = cases(CASES, vocabulary_of(str(models[0])), chat)
    for model in models:
        deployments.deploy(model)
        for case in asked:
            name, texts = whole_texts(endpoint, case)
            expected.setdefault(name, []).append(texts)
    deployments.now = 1
    traffic = Traffic(endpoint, asked, expected)
    threads = traffic.start(given.clients)
    memory = direct(deployments, traffic, given.minutes * 60)
    traffic.stopping.set()
    for thread in threads:
        thread.join()
    return record(traffic, deployments, memory, given.minutes)


def direct(deployments: Deployments, traffic: Traffic, seconds: float) -> dict[str, float]:
    """Change what is deployed, in twelve parts of the time; returns the replicas' memory at its third and its end, in MB."""
    turns: list[Callable[[], None]] = [deployments.good, deployments.refused, deployments.good, deployments.failed]
    start, memory = time.monotonic(), {}
    for turn in range(12):
        if turn == 1:
            deployments.kill(traffic)
        else:
            turns[turn % 4]()
        time.sleep(max(0.0, start + (turn + 1) * seconds / 12 - time.monotonic()))
        so_far = f"{(time.monotonic() - start) / 60:5.1f} min  {sum(traffic.done.values()):7,} requests"
        megabytes = f"{replica_megabytes():,.0f} MB"
        print(so_far, megabytes, deployments.counts, *traffic.problems[-1:], sep="  ", flush=True)
        if turn == 3:
            memory["third_mb"] = replica_megabytes()
    return memory | {"end_mb": replica_megabytes()}


def record(traffic: Traffic, deployments: Deployments, memory: dict[str, float], minutes: float) -> dict[str, Any]:
    """What happened, with everything that was wrong in `problems`."""
    problems = list(traffic.problems)
    if memory["end_mb"] > GROWTH * memory["third_mb"]:
        problems.append(f"the memory of the replicas grew: {memory}")
    if missing := [name for name, count in deployments.counts.items() if not count]:
        problems.append(f"these changes never had the intended result: {missing}")
    if unanswered := [model for model in traffic.expected if not traffic.answered_by[model]]:
        problems.append(f"no text of these models was compared: {unanswered}")
    if (running := _running(traffic.endpoint)) > 0:
        problems.append(f"{running} requests run after all clients have gone")
    return {
        "minutes": minutes,
        "requests": dict(traffic.done),
        "compared": dict(traffic.answered_by),
        "deployments": deployments.counts,
        "excused": dict(traffic.excused),
        "memory": memory,
        "problems": len(problems),
        "first_problems": problems[:5],
    }


def _running(endpoint: Endpoint) -> float:
    """Requests that run or wait, after a few seconds in which abandoned ones are cancelled."""
    for _ in range(20):
        time.sleep(1)
        lines = endpoint.get("/metrics")[1].splitlines()
        names = ("kforcing_num_requests_running{", "kforcing_num_requests_waiting{")
        if not (total := sum(float(line.split()[-1]) for line in lines if line.startswith(names))):
            break
    return total


def main() -> None:
    """Read the command line, run the traffic, print what happened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="of traffic (default %(default)s)")
    parser.add_argument("--model", metavar="DIR", help="a model to serve; needs --other")
    parser.add_argument("--other", metavar="DIR", help="one of the same vocabulary, in a directory of another name")
    parser.add_argument("--clients", type=int, default=8, help="requests at once (default %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="of the endpoint (default %(default)s)")
    given = parser.parse_args()
    if bool(given.model) != bool(given.other):
        parser.error("give both --model and --other, or none of them")
    import ray
    from ray import serve

    with tempfile.TemporaryDirectory() as folder:
        ray.init(address="local", num_cpus=4, log_to_driver=False, include_dashboard=False)
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": given.port})
            result = run(given, Path(folder))
        finally:
            serve.shutdown()
            ray.shutdown()
    print(json.dumps(result))
    sys.exit(1 if result["problems"] else 0)


if __name__ == "__main__":
    main()
