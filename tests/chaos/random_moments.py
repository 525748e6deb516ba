"""Interruptions of a run at random moments."""

import os
import random
import signal
import time
from contextlib import suppress

from tests.chaos.cells import COMPONENTS
from tests.pipeline_runs import processes_below

LONGEST_PAUSE_S = 75.0
"""The longest time between two interruptions; an undisturbed start takes about twice as long."""
ALL = "all processes"


def interrupted(run, most, seed):
    """Interrupt a run until it has ended well, up to `most` times, and start it again whenever it has ended otherwise.

    A third of the interruptions end all processes of the run at once, a third one worker or actor, a third any component.
    Each is SIGKILL, at a uniformly random time after the one before.

    Returns:
        (dict) `interruptions`, a list of `{"after_s", "what", "step", "line"}`: when and what was killed, the last step and
        the last line before; `ends`, how each start but the last ended.
    Raises RuntimeError if the run does not end well.
    """
    draw, done, ends = random.Random(seed), [], []
    while True:
        run.start()
        while len(done) < most:
            pause = draw.uniform(0.0, LONGEST_PAUSE_S)
            began = time.monotonic()
            while run.process.poll() is None and time.monotonic() < began + pause:
                time.sleep(0.05)
            if run.process.poll() is not None:
                break
            line = ["", *run.out.read_text().splitlines()][-1]
            where = {"after_s": round(pause, 1), "step": max(run.steps(), default=0), "line": line[:100]}
            done.append({"what": kill(run, draw)} | where)
        if (code := run.wait()) == 0:
            return {"interruptions": done, "ends": ends}
        ends.append(f"{code}: {run.complaint()}"[:300])
        if len(ends) > len(done):
            raise RuntimeError(f"the run failed of itself: {ends} {run.said()[-2000:]}")


def kill(run, draw):
    """Kill something of a run, and return its name."""
    there = {name: processes_below(run.process.pid, title) for name, title in COMPONENTS.items() if title}
    there = {name: pids for name, pids in there.items() if pids}
    workers = [name for name in there if COMPONENTS[name].startswith(("ray::RayTrainWorker", "ray::MapWorker"))]
    what = draw.choice((ALL, draw.choice(workers or [ALL]), draw.choice(["driver", *there])))
    if what == ALL:
        pids = [run.process.pid, *processes_below(run.process.pid, "")]
    else:
        pids = [run.process.pid] if what == "driver" else [draw.choice(there[what])]
    for pid in pids:
        with suppress(ProcessLookupError):  # it has ended
            os.kill(pid, signal.SIGKILL)
    return what
