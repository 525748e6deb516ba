"""All that the pipeline does with DeepSpeed: the engine, the moving average, checkpoints and the export of whole weights."""

from __future__ import annotations

import importlib
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.utils import get_total_norm

from kforcing.distillation.losses import LossSums
from kforcing.remote import fetch, uri_of
from pipelines.config.schema import TrainConfig
from pipelines.files import atomic_folder, checksum, write_json
from pipelines.runs.stages import StageError
from pipelines.storage import push, remove, sizes
from pipelines.training.checkpoints import LATEST, latest_checkpoint
from pipelines.training.guard import StepFigures
from pipelines.training.schedule import ema_decay

MUON_MOMENTUM = 0.95
CONVERTED = "converted.txt"
"""File of a converted checkpoint that is there when all others are."""
SAFE_CLASSES = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
"""What a checkpoint of DeepSpeed holds beside tensors and plain values."""


def _import_deepspeed() -> Any:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with _without("mlflow"):  # its autotuner would import it, which takes a second and which nothing here uses
        import deepspeed

    if not torch.cuda.is_available():
        # The shared-memory collective is compiled at first use; gloo alone needs neither compiler nor ninja.
        from deepspeed import ops

        ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed loads pickles; a pickle that names anything else than tensors and these classes is refused.
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    places = (name.rpartition(".") for name in SAFE_CLASSES)
    torch.serialization.add_safe_globals([getattr(importlib.import_module(module), name) for module, _, name in places])
    torch.compiler.set_stance("force_eager")  # DeepSpeed would compile Muon, for which a machine may lack the compiler
    deepspeed.utils.logger.setLevel("ERROR")
    return deepspeed


@contextmanager
def _without(library: str) -> Iterator[None]:
    """Let imports of a library fail for the time of the block, unless it is there already."""
    hidden = sys.modules.setdefault(library, cast(Any, None)) is None
    try:
        yield
    finally:
        if hidden:
            del sys.modules[library]


def engine_config(train: TrainConfig, world_size: int, universal: bool) -> dict[str, Any]:
    """The DeepSpeed config of a stage; `universal` loads checkpoints of another world size."""
    optimizer = {
        "lr": train.lr,
        "betas": [train.beta1, train.beta2],
        "eps": train.eps,
        "weight_decay": train.weight_decay,
        "torch_adam": True,
    }
    if train.muon_lr:
        optimizer |= {"muon_lr": train.muon_lr, "momentum": MUON_MOMENTUM, "ns_method": "gram", "adam_w_mode": True}
    return {
        "train_batch_size": train.batch,
        "train_micro_batch_size_per_gpu": train.micro_batch,
        "gradient_accumulation_steps": train.batch // (train.micro_batch * world_size),
        "gradient_clipping": train.clip_norm,
        "zero_optimization": {"stage": train.zero_stage},
        "bf16": {"enabled": train.precision == "bf16"},
        "optimizer": {"type": "Muon" if train.muon_lr else "AdamW", "params": optimizer},
        "checkpoint": {"load_universal": universal},
        "steps_per_print": 10**9,
    }


def build_engine(module: nn.Module, train: TrainConfig, checkpoints: Path) -> Any:
    """Wrap a module in a DeepSpeed engine on the process group that is already up.

    `checkpoints` is the folder that `load_checkpoint` will read: DeepSpeed must know now if its world size is another one.
    """
    deepspeed = _import_deepspeed()
    deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    latest, world = latest_checkpoint(checkpoints), dist.get_world_size()
    universal = latest is not None and latest["world_size"] != world
    config = engine_config(train, world, universal)
    if train.zero_stage == 3:
        for part in module.modules():
            if type(part) is nn.Linear and not part.weight.requires_grad:
                part.__class__ = FrozenLinear
    trained = [p for p in module.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(model=module, model_parameters=trained, config=config)
    return engine


class FrozenLinear(nn.Linear):
    """A linear map that is not trained, whose weights autograd keeps by an alias.

    ZeRO 3 empties parameters as soon as their module has run. A pass that is computed again in a backward pass
    (`kforcing.chunking`) needs them a little longer; torch sees to that for trained parameters alone.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) → (..., out)."""
        return linear(x, self.weight.detach(), None if self.bias is None else self.bias.detach())


@torch.no_grad()
def figures(engine: Any, sums: LossSums) -> StepFigures:
    """Loss, gradient and weights of the step that was just made, over all ranks. Collective: every rank must call it."""
    weights = get_total_norm([_partition(p) for _, p in trained_parameters(engine)])
    local = [sums.loss.double(), torch.tensor(float(sums.tokens)), weights.double()]
    packed = torch.stack([x.to(sums.loss.device, torch.float64) for x in local])
    dist.all_reduce(packed)
    loss, tokens, norm = packed.tolist()
    return StepFigures(loss / tokens, float(engine.get_global_grad_norm()), norm)


def trained_parameters(engine: Any) -> list[tuple[str, Any]]:
    """(name, parameter) of every parameter that is not frozen, in the same order on every rank."""
    return [(n, p) for n, p in engine.module.named_parameters() if p.requires_grad]


def _partition(parameter: Tensor) -> Tensor:
    """The part of a parameter that this rank holds: its ZeRO-3 partition, or all of it."""
    return getattr(parameter, "ds_tensor", parameter)


class MovingAverage:
    """Exponential moving average of the weights in float32, sharded over ranks.

    Under ZeRO 3 each rank averages its own partitions; below that, parameters are dealt out to ranks round-robin.
    """

    def __init__(self, engine: Any, decay: float):
        self.decay = decay
        named = trained_parameters(engine)
        sharded = any(hasattr(p, "ds_tensor") for _, p in named)
        rank, world = dist.get_rank(), dist.get_world_size()
        self.parameters = {n: p for i, (n, p) in enumerate(named) if sharded or i % world == rank}
        self.average = {n: _partition(p).detach().float().clone() for n, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the current weights; `ema_decay` says by how much."""
        weight = 1 - ema_decay(step, self.decay)
        for name, parameter in self.parameters.items():
            self.average[name].lerp_(_partition(parameter).float(), weight)

    def load(self, folder: Path, world_size: int) -> None:
        """Read the average from a checkpoint that `world_size` ranks wrote."""
        files = [load_file(folder / f"average-{rank}.safetensors") for rank in range(world_size)]
        for name, parameter in self.parameters.items():
            whole = torch.cat([file[name].flatten() for file in files if name in file])
            mine = self.average[name].view(-1)
            first = dist.get_rank() * mine.numel() if hasattr(parameter, "ds_tensor") else 0
            part = whole[first : first + mine.numel()]  # the last partition may be padded
            mine[: part.numel()].copy_(part)


def save_checkpoint(engine: Any, average: MovingAverage | None, folder: Path, step: int) -> None:
    """Write a checkpoint from all ranks. Then `latest.json` names it, atomically. The one before it is kept."""
    tag = f"step-{step:08d}"
    if dist.get_rank() == 0:
        before = latest_checkpoint(folder)
        for old in {name.partition("/")[0] for name in sizes(folder) if name.startswith("step-")}:
            if before is None or old != before["tag"]:
                remove(folder / old)
    dist.barrier()
    # Frozen weights are those that the stage begins with, so a checkpoint need not hold them.
    engine.save_checkpoint(str(folder), tag=tag, save_latest=False, exclude_frozen_parameters=True)
    if average:
        save_file(average.average, folder / tag / f"average-{dist.get_rank()}.safetensors")
    dist.barrier()  # until then files of other ranks may have temporary names
    written = _written(folder / tag)
    if dist.get_rank() == 0:
        bytes_, checksums = ({name: facts[i] for name, facts in written.items()} for i in (0, 1))
        record = {"tag": tag, "step": step, "world_size": dist.get_world_size(), "bytes": bytes_, "crc32": checksums}
        write_json(folder / tag / LATEST, record)
        write_json(folder / LATEST, record)
    dist.barrier()
    for copy in folder.glob("step-*") if uri_of(folder) else ():
        if copy.name != tag:  # the URI has it
            shutil.rmtree(copy, ignore_errors=True)


def _written(checkpoint: Path) -> dict[str, tuple[int, int]]:
    """(bytes, checksum) of every file of a checkpoint, on all ranks. Each rank reads, and uploads, what it has written."""
    rank, files = dist.get_rank(), [file for file in checkpoint.iterdir() if file.is_file()]
    own = [file for file in files if _writer(file.name) == rank]
    facts = {file.name: (file.stat().st_size, checksum(file)) for file in own}
    for file in own:
        push(file)
    every: list[dict[str, tuple[int, int]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(every, facts)
    return {name: value for some in every for name, value in some.items()}


def _writer(name: str) -> int:
    """The rank that has written a file of a checkpoint."""
    found = re.search(r"(?:pp_rank_|average-)(\d+)", name)
    return int(found[1]) if found else 0


def refuse_code(folder: Path) -> None:
    """Raise StageError when a file of the newest checkpoint would run code as it is loaded: it is not one of ours."""
    latest = latest_checkpoint(folder)
    for file in sorted((folder / latest["tag"]).rglob("*.pt")) if latest else ():
        try:
            unknown = sorted(set(torch.serialization.get_unsafe_globals_in_checkpoint(file)) - set(SAFE_CLASSES))
        except (OSError, MemoryError):  # the disk's or the node's fault
            raise
        except Exception as error:  # not a zip archive, as an old pickle is not
            raise StageError(
                f"{file} is refused: it is not a file that torch.save wrote ({type(error).__name__}: {error})"[:400]
                + f". Loading it could run code. Remove {folder}, and the stage is trained again"
            ) from None
        if unknown:
            raise StageError(
                f"{file} is refused: beside tensors it holds {', '.join(unknown)[:200]}, which could run code. This program "
                f"never writes such files: someone else has changed the checkpoint. Find out who did, and remove {folder}"
            )


def check_workers(folder: Path, train: TrainConfig) -> None:
    """Raise StageError when the newest checkpoint cannot be continued by this number of workers."""
    latest = latest_checkpoint(folder)
    if latest and train.muon_lr and latest["world_size"] != train.workers:
        raise StageError(
            f"{folder / latest['tag']} was written by {latest['world_size']} workers, and DeepSpeed cannot deal Muon's "
            f"momentum to {train.workers}: set train.workers={latest['world_size']}, or remove {folder} to train it again"
        )


def load_checkpoint(engine: Any, average: MovingAverage | None, folder: Path) -> int:
    """Resume weights, optimiser and average from the newest checkpoint; returns the step to continue at."""
    latest = latest_checkpoint(folder)
    if latest is None:
        return 0
    tag = latest["tag"]
    fetch(folder / tag)
    if latest["world_size"] != dist.get_world_size():
        tag = _universal(folder, tag)
    loaded, _ = engine.load_checkpoint(str(folder), tag=tag, custom_load_fn=_load_trained)
    assert loaded is not None, f"DeepSpeed found no checkpoint {tag} in {folder}"
    if average:
        average.load(folder / latest["tag"], latest["world_size"])
    return latest["step"]


def _load_trained(src: dict[str, Any], dst: nn.Module) -> None:
    """Load a state dictionary that may lack frozen weights, and nothing else."""
    result = dst.load_state_dict(src, strict=False)
    frozen = {name for name, parameter in dst.named_parameters() if not parameter.requires_grad}
    wrong = [*(name for name in result.missing_keys if name not in frozen), *result.unexpected_keys]
    if wrong:
        raise RuntimeError(f"a checkpoint and the model of its stage disagree on {', '.join(sorted(wrong))}")


def _universal(folder: Path, tag: str) -> str:
    """Convert a checkpoint of another world size; returns the tag of the result."""
    if dist.get_rank() == 0 and f"{tag}-universal/{CONVERTED}" not in sizes(folder):
        remove(folder / f"{tag}-universal")
        with atomic_folder(folder / f"{tag}-universal", CONVERTED) as partial:
            places = ["--input_folder", str(folder / tag), "--output_folder", str(partial)]
            line = [sys.executable, "-m", __name__, *places, "--inject_missing_state", "--num_extract_workers", "1"]
            done = subprocess.run([*line, "--num_merge_workers", "1"], capture_output=True, text=True)
            if done.returncode:
                raise StageError(
                    f"cannot convert checkpoint {folder / tag} to another number of workers:\n{done.stderr[-2000:]}"
                )
            (partial / CONVERTED).write_text(tag)
    dist.barrier()
    fetch(folder / f"{tag}-universal")
    return f"{tag}-universal"


@torch.no_grad()
def whole_weights(engine: Any, average: MovingAverage | None) -> dict[str, Tensor]:
    """All trained weights in float32 on rank 0's CPU (the average's when there is one), gathered one at a time.

    Collective: every rank must call it. Ranks other than 0 get an empty dictionary.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    weights = {}
    for index, (name, parameter) in enumerate(trained_parameters(engine)):
        part: Tensor | None = average.average.get(name) if average else _partition(parameter).float()
        if hasattr(parameter, "ds_tensor"):
            assert part is not None
            parts = [torch.empty_like(part) for _ in range(world)]
            dist.all_gather(parts, part)
            whole = torch.cat(parts)[: parameter.ds_numel].view(parameter.ds_shape)
        elif average:
            whole = torch.empty(parameter.shape, device=parameter.device) if part is None else part
            dist.broadcast(whole, src=index % world)
        else:
            assert part is not None
            whole = part
        if rank == 0:
            weights[name] = whole.cpu().clone()
    return weights


if __name__ == "__main__":  # `_universal` converts a checkpoint so, under the same rules for pickles
    _import_deepspeed()
    runpy.run_module("deepspeed.checkpoint.ds_to_universal", run_name="__main__", alter_sys=True)
