"""The cells of the fault matrix."""

import re
import resource
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.runs import STAGE, paused, replaced, signalled, slowed
from tests.pipeline_runs import processes_below, run_command


def nothing(run):
    """No remedy is needed."""


@dataclass(frozen=True)
class Cell:
    """A fault, and what an operator does about it before the next start."""

    component: str
    moment: str
    way: str
    hit: Callable
    """It may return a text that a warning of the next start must have."""
    remedy: Callable = nothing
    disk_mb: int = 0
    """Size of a file system of its own for the run; 0 for none."""
    nodes: bool = False
    """Whether the run is on a cluster of several nodes, which begins without any."""

    @property
    def alone(self):
        """Whether no other fault hits the same run: this one needs another moment, a place of its own, or shows late."""
        late = self.way == "out of memory" or self.component in ("raylet", "GCS")
        return late or self.moment != "training" or bool(self.disk_mb) or self.nodes

    @property
    def name(self):
        """The name of the cell, also of its folder."""
        return re.sub("[^a-z0-9.]+", "-", f"{self.component} {self.moment} {self.way}".lower())


def powerless_then(change):
    """A fault: all processes of the run end at once, as on a machine without power, and what they left is changed.

    It returns what `change` does: the name of the file that the next start must name in a warning, if any.
    """

    def hit(run):
        run.end()
        return change(run)

    return hit


def latest_checkpoint(run):
    """The folder of the newest checkpoint."""
    return max((run.path / STAGE / "checkpoints").glob("step-*/latest.json")).parent


def changed(find, content_of, noticed):
    """A change of the content of a file; it returns the name of the file if somebody must notice it."""

    def change(run):
        file = find(run)
        file.write_bytes(content_of(file.read_bytes()))
        return file.name if noticed else None

    return change


def one_bit_changed(content):
    """The same bytes but for one bit in the middle."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def in_run(*names):
    """Finds a file of the run directory."""
    return lambda run: run.path.joinpath(*names)


def in_checkpoint(pattern):
    """Finds a file of the newest checkpoint."""
    return lambda run: max(latest_checkpoint(run).glob(pattern))


def shard(run):
    """A file of the corpus."""
    return min((run.folder / "data").rglob("*.parquet"))


def filled(run):
    """A fault: nothing more fits on the disk."""
    with (run.folder / "filler").open("wb") as file:
        try:
            while True:
                file.write(bytes(1 << 16))
                file.flush()
        except OSError:
            pass


def emptied_disk(run):
    """The remedy: there is room again."""
    (run.folder / "filler").unlink()


def remounted(mode):
    """Mount the disk of the run again, read-only or writable."""

    def change(run):
        done = run_command(["mount", "-o", f"remount,{mode}", str(run.folder)], "/")
        assert done.returncode == 0, done.stderr

    return change


def lost_head(run):
    """A fault: the head of the cluster is lost."""
    run.cluster.lose_head()


def new_cluster(run):
    """The remedy: another cluster."""
    run.cluster.begin_again()


def out_of_memory(title):
    """A fault: a process gets no more memory than it has, so its next large allocation fails."""

    def hit(run):
        pid = processes_below(run.process.pid, title)[0]
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
        resource.prlimit(pid, resource.RLIMIT_AS, (pages * resource.getpagesize(), resource.RLIM_INFINITY))

    return hit


def without_folder(*names):
    """A change: a folder is gone."""
    return lambda run: shutil.rmtree(run.path.joinpath(*names))


COMPONENTS = {
    "driver": "",
    "train controller": "ray::TrainController",
    "train worker": "ray::RayTrainWorker",
    "rollout actor": "ray::MapWorker(MapBatches(Rollouts))",
    "split coordinator": "ray::SplitCoordinator",
    "dataset manager": "ray::DatasetManager",
    "relay of metrics": "ray::Relay",
    "evaluation actor": "ray::MapWorker(MapBatches(EvalActor))",
    "autoscaling coordinator": "ray::_AutoscalingCoordinatorActor",
    "raylet": "raylet/raylet",
    "GCS": "gcs/gcs_server",
}
KILLS = {
    "start": ("driver", "train controller", "train worker", "dataset manager", "raylet"),
    "training": tuple(name for name in COMPONENTS if name != "evaluation actor"),
    "checkpoint": ("driver", "train worker"),
    "export": ("driver", "train worker"),
    "evaluation": ("driver", "evaluation actor"),
    "report": ("driver",),
}
DAMAGES = {
    "cut": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "with one bit changed": one_bit_changed,
}
UNNOTICED = ("newest checkpoint, its record", "log.jsonl")
"""Files without which nothing is lost."""
FILES = {
    "newest checkpoint, its record": (in_checkpoint("latest.json"), ("cut",)),
    "newest checkpoint, model": (in_checkpoint("*model_states.pt"), ("cut", "with one bit changed")),
    "newest checkpoint, optimiser": (in_checkpoint("*optim_states.pt"), ("cut", "with one bit changed")),
    "newest checkpoint, moving average": (in_checkpoint("average-0.safetensors"), ("cut", "with one bit changed")),
    "record of the newest checkpoint": (in_run(STAGE, "checkpoints", "latest.json"), ("cut", "empty")),
    "corpus": (shard, ("cut", "with one bit changed")),
    "run.json": (in_run("run.json"), ("cut", "empty")),
    "log.jsonl": (in_run("log.jsonl"), ("cut",)),
    "teacher's manifest": (in_run("teacher", "manifest.json"), ("cut", "empty")),
}


def all_cells():
    """Every cell of the matrix."""
    cells = [
        Cell(name, moment, "SIGKILL", signalled(COMPONENTS[name], signal.SIGKILL))
        for moment, names in KILLS.items()
        for name in names
    ]
    cells += [
        Cell("both train workers", "training", "SIGKILL", signalled("ray::RayTrainWorker", signal.SIGKILL, count=2)),
        Cell("driver", "training", "SIGTERM", signalled("", signal.SIGTERM)),
        Cell("driver", "training", "SIGINT", signalled("", signal.SIGINT)),
        Cell("driver", "evaluation", "SIGINT", signalled("", signal.SIGINT)),
        Cell("train worker", "training", "20 s standstill", paused("ray::RayTrainWorker")),
        Cell("rollout actor", "training", "20 s standstill", paused(COMPONENTS["rollout actor"])),
        Cell("train worker", "training", "out of memory", out_of_memory("ray::RayTrainWorker")),
        Cell("rollout actor", "training", "out of memory", out_of_memory(COMPONENTS["rollout actor"])),
        Cell("disk", "training", "full", filled, emptied_disk, disk_mb=96),
        Cell("disk", "evaluation", "full", filled, emptied_disk, disk_mb=96),
        Cell("disk", "training", "30 s slow", slowed, disk_mb=96),
        Cell("disk", "training", "read-only", remounted("ro"), remounted("rw"), disk_mb=96),
    ]
    cells += [
        Cell(name, "training", f"file {damage}", powerless_then(changed(find, DAMAGES[damage], name not in UNNOTICED)))
        for name, (find, damages) in FILES.items()
        for damage in damages
    ]
    cells += [
        Cell(f"node of the {pool}", "training", "lost, another joins", replaced(pool), nodes=True)
        for pool in ("trainers", "rollouts")
    ]
    cells.append(Cell("head node", "training", "lost, a new cluster starts", lost_head, new_cluster, nodes=True))
    cells.append(Cell("checkpoints", "training", "folder gone", powerless_then(without_folder(STAGE, "checkpoints"))))
    return cells
