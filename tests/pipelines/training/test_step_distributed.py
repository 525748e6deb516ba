"""Real DeepSpeed on two gloo ranks against one rank and against plain torch."""

import dataclasses
import os
from types import SimpleNamespace

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.multiprocessing import ProcessRaisedException

from kforcing import Design, NoiseConfig, PushForwardLM
from kforcing.attention.windows import Windows
from kforcing.chunking import checkpoint_layers
from kforcing.distillation.losses import LossSums, hard_target_loss
from kforcing.distillation.steps import StudentStep, WindowBatch
from kforcing.remote import local
from pipelines.config.schema import TrainConfig
from pipelines.runs.stages import StageError
from pipelines.storage import sizes
from pipelines.training import deepspeed_engine as strategy
from pipelines.training.checkpoints import latest_checkpoint, set_changed_aside
from pipelines.training.guard import Diverged
from pipelines.training.progress import Progress
from pipelines.training.schedule import learning_rate, set_learning_rates
from pipelines.training.single_process import train_here
from pipelines.training.step import optimizer_step, reduce_sums
from tests.models import VOCAB, make_backbone, make_sequential
from tests.ranks import run_ranks

pytestmark = pytest.mark.cluster
TRAIN = TrainConfig(
    batch=8, micro_batch=2, lr=1e-2, clip=1.0, ema=0.9, workers=2, steps=10, warmup=2, schedule="cosine"
)


def step_module(chunk=10**6):
    student = PushForwardLM.from_backbone(make_backbone(scale=2.0), k=2, design=Design(noise=NoiseConfig(0.25, 8.0)))
    torch.manual_seed(1)
    for parameter in student.readout.parameters():
        parameter.data.normal_(0, 0.1)
    return StudentStep(student, chunk=chunk).eval()


def frugal_module():
    """The same with logits of 4 tokens at a time, and layers computed again: what ranks run."""
    module = step_module(chunk=4)
    checkpoint_layers(module)
    return module


def sequential_module(chunk=4):
    """A sequential student with a frozen trunk, whose labels come from that trunk."""
    torch.manual_seed(1)
    return StudentStep(make_sequential(make_backbone(scale=2.0), k=2, hint_layers=1), "soft", chunk)


def scattered_config(*args, made=strategy.engine_config):
    """As pipelines have it, but ZeRO 3 scatters weights as eagerly as it does large ones."""
    config = made(*args)
    for name in ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance", "prefetch_bucket_size"):
        config["zero_optimization"][f"stage3_{name}"] = 0
    return config


def adapter_module(chunk=10**6):
    """A GPT-2 student whose hints pass through the frozen trunk's own matrices."""
    torch.manual_seed(1)
    student = make_sequential(make_backbone("gpt2", scale=2.0), k=2, hints="adapter", hint_layers=1)
    return StudentStep(student, "soft", chunk).eval()


def frugal_adapter_module():
    """The same with logits of 4 tokens at a time and layers computed again, and weights that are soon scattered again."""
    strategy.engine_config = scattered_config
    module = adapter_module(chunk=4)
    checkpoint_layers(module)
    return module


def windows(step, rows, n_windows):
    """Deterministic windows for global row numbers."""
    g = [torch.Generator().manual_seed(1000 * step + row) for row in rows]
    parts = Windows(
        torch.stack([torch.randint(0, VOCAB, (10,), generator=x) for x in g]),
        torch.stack([torch.randperm(10, generator=x)[:n_windows] for x in g]),
        torch.stack([torch.rand(n_windows, 2, generator=x) for x in g]),
        torch.ones(len(rows)),
    )
    return WindowBatch(parts, torch.stack([torch.randint(0, VOCAB, (n_windows, 2), generator=x) for x in g]))


def even_micro_batches(step, rank, world):
    """8 rows a step in micro-batches of 2, dealt to ranks."""
    mine = range(rank * 8 // world, (rank + 1) * 8 // world)
    return [windows(step, mine[i : i + 2], 3) for i in range(0, len(mine), 2)]


def uneven_micro_batches(step, rank, world):
    """The same 8 rows, but the first rank has 2 of them and the second 6 (in two micro-batches each)."""
    parts = [[0], [1], [2, 3, 4], [5, 6, 7]]
    return [windows(step, rows, 3) for rows in parts[rank * 4 // world : (rank + 1) * 4 // world]]


def train(
    rank,
    world,
    out,
    zero_stage,
    deal,
    steps=3,
    resume_at=None,
    length=None,
    precision="fp32",
    module=frugal_module,
    **changes,
):
    config = dataclasses.replace(
        TRAIN, zero_stage=zero_stage, workers=world, precision=precision, steps=length or TRAIN.steps, **changes
    )
    engine = strategy.build_engine(module(), config, out / "checkpoints")
    average = strategy.MovingAverage(engine, config.ema)
    start = strategy.load_checkpoint(engine, average, out / "checkpoints")
    assert start == (resume_at or 0)
    losses = []
    for step in range(start, steps):
        set_learning_rates(engine.optimizer.param_groups, step, config)
        sums = optimizer_step(engine, deal(step, rank, world))
        average.update(step)
        losses.append(reduce_sums(sums)["loss"])
    strategy.save_checkpoint(engine, average, out / "checkpoints", steps)
    weights = strategy.whole_weights(engine, average)
    if rank == 0:
        out.mkdir(exist_ok=True)
        save_file({**weights, "losses": torch.tensor(losses)}, out / "weights.safetensors")


def run(tmp_path, name, world, *args, **kwargs):
    out = tmp_path / name
    run_ranks(world, _Call(args, kwargs), out)
    return load_file(out / "weights.safetensors")


class _Call:
    def __init__(self, args, kwargs):
        self.args, self.kwargs = args, kwargs

    def __call__(self, rank, world, out):
        train(rank, world, out, *self.args, **self.kwargs)


@pytest.fixture(scope="module")
def plain():
    """Three steps of plain torch AdamW on the whole batch, with the moving average."""
    return train_plainly(step_module())


def train_plainly(module):
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1, betas=(0.9, 0.999), eps=1e-6, weight_decay=0)
    average = {n: p.detach().clone() for n, p in trained.items()}
    losses = []
    for step in range(3):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, TRAIN)
        sums = module(windows(step, range(8), 3))
        optimizer.zero_grad()
        (sums.loss / sums.tokens).backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), TRAIN.clip)
        optimizer.step()
        losses.append(sums.loss.item() / sums.tokens)
        weight = 1 - min(TRAIN.ema, (1 + step) / (10 + step))
        for name, parameter in trained.items():
            average[name].lerp_(parameter.detach(), weight)
    return {**average, "losses": torch.tensor(losses)}


def assert_same(actual, expected):
    assert set(actual) == set(expected)
    for name in expected:
        torch.testing.assert_close(
            actual[name], expected[name], rtol=2e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_two_ranks_train_like_plain_torch_on_the_whole_batch(tmp_path, plain, zero_stage):
    assert_same(run(tmp_path, "two", 2, zero_stage, even_micro_batches), plain)


def test_one_rank_with_accumulation_trains_the_same(tmp_path, plain):
    assert_same(run(tmp_path, "one", 1, 1, even_micro_batches), plain)


@pytest.mark.parametrize("zero_stage", [1, 2])
def test_uneven_batches_do_not_change_the_gradient(tmp_path, plain, zero_stage):
    assert_same(run(tmp_path, "uneven", 2, zero_stage, uneven_micro_batches), plain)


def test_zero_3_refuses_uneven_batches_before_ranks_wait_for_each_other(tmp_path):
    with pytest.raises(ProcessRaisedException, match=r"micro-batches of \[\[6, 6\], \[18, 18\]\] target tokens"):
        run(tmp_path, "uneven", 2, 3, uneven_micro_batches)


@pytest.mark.parametrize(("zero_stage", "precision"), [(1, "fp32"), (2, "bf16"), (3, "fp32")])
def test_every_rank_sees_that_the_step_of_one_rank_was_broken(tmp_path, zero_stage, precision):
    run_ranks(2, _check_figures, tmp_path, zero_stage, precision)


def _check_figures(rank, world, folder, zero_stage, precision):
    config = dataclasses.replace(TRAIN, zero_stage=zero_stage, precision=precision, clip=0.0)
    engine = strategy.build_engine(step_module(), config, folder)
    set_learning_rates(engine.optimizer.param_groups, 0, config)
    sums = optimizer_step(engine, even_micro_batches(0, rank, world))
    figures = strategy.figures(engine, sums)
    figures.check(100.0)
    assert figures.loss == pytest.approx(reduce_sums(sums)["loss"])
    broken = even_micro_batches(1, rank, world)
    if rank == 1:
        broken[1].windows.noise_BWK[0, 0, 0] = torch.nan
    figures = strategy.figures(engine, optimizer_step(engine, broken))
    with pytest.raises(Diverged, match="the loss is nan"):
        figures.check(100.0)


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_a_resumed_run_ends_where_an_undisturbed_one_does(tmp_path, plain, zero_stage):
    run(tmp_path, "resumed", 2, zero_stage, even_micro_batches, steps=2)
    again = run(tmp_path, "resumed", 2, zero_stage, even_micro_batches, steps=3, resume_at=2)
    again["losses"] = torch.cat([plain["losses"][:2], again["losses"]])
    assert_same(again, plain)


def test_ranks_on_two_nodes_resume_from_object_storage_on_two_others(tmp_path, plain, store):
    """Each node has a copy of its own; the server fails every tenth request."""
    uri, faults = store
    faults.fail_every(10)
    for steps, resume_at, nodes in ((2, None, "a"), (3, 2, "b")):
        run_ranks(2, _train_on_nodes, tmp_path / nodes, uri, steps, resume_at)
    again = load_file(next((tmp_path / "b0").rglob("weights.safetensors")))
    again["losses"] = torch.cat([plain["losses"][:2], again["losses"]])
    assert_same(again, plain)
    latest = latest_checkpoint(local(uri) / "checkpoints")
    assert (latest["step"], set(latest["bytes"])) == (3, set(latest["crc32"]))
    assert {name.partition("/")[0] for name in sizes(local(uri) / "checkpoints")} == {
        "latest.json",
        "step-00000002",
        "step-00000003",
    }
    set_changed_aside(local(uri) / "checkpoints")
    strategy.refuse_code(local(uri) / "checkpoints")
    assert faults.failed > 5


def _train_on_nodes(rank, world, nodes, uri, steps, resume_at):
    os.environ["XDG_CACHE_HOME"] = f"{nodes}{rank}"
    train(rank, world, local(uri), 2, even_micro_batches, steps=steps, resume_at=resume_at)


def test_a_flipped_byte_of_a_checkpoint_is_noticed_and_the_checkpoint_before_it_is_the_latest(tmp_path):
    run(tmp_path, "flipped", 2, 2, even_micro_batches, steps=2)
    run(tmp_path, "flipped", 2, 2, even_micro_batches, steps=3, resume_at=2)
    checkpoints = tmp_path / "flipped" / "checkpoints"
    latest = latest_checkpoint(checkpoints)
    files = {file.name for file in (checkpoints / latest["tag"]).iterdir()}
    assert set(latest["crc32"]) == set(latest["bytes"]) == files - {"latest.json"}
    assert {"average-1.safetensors", "mp_rank_00_model_states.pt"} < files
    set_changed_aside(checkpoints)
    assert latest_checkpoint(checkpoints) == latest
    (part,) = (checkpoints / latest["tag"]).glob("*zero_pp_rank_1_*")
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    set_changed_aside(checkpoints)
    assert latest_checkpoint(checkpoints)["step"] == 2


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_a_frozen_trunk_stays_out_of_training_and_resuming(tmp_path, zero_stage):
    """Weights that come back are the trained ones, and those of plain torch; 2 ranks, then resumed by 1."""
    plainly = train_plainly(sequential_module(chunk=10**6))
    assert not any("backbone" in name for name in plainly)
    run(tmp_path, "frozen", 2, zero_stage, even_micro_batches, steps=2, module=sequential_module)
    options = {"steps": 3, "resume_at": 2, "module": sequential_module}
    again = run(tmp_path, "frozen", 1, zero_stage, even_micro_batches, **options)
    again["losses"] = torch.cat([plainly["losses"][:2], again["losses"]])
    assert_same(again, plainly)


def test_zero_3_keeps_the_frozen_matrices_that_a_second_computation_needs(tmp_path):
    weights = run(tmp_path, "adapter", 2, 3, even_micro_batches, module=frugal_adapter_module)
    assert_same(weights, train_plainly(adapter_module()))


def test_bf16_trains_close_to_fp32(tmp_path, plain):
    losses = run(tmp_path, "bf16", 2, 2, even_micro_batches, precision="bf16")["losses"]
    torch.testing.assert_close(losses, plain["losses"], rtol=0.03, atol=0.03)


def test_a_frozen_trunk_trains_in_bf16_too(tmp_path):
    plainly = train_plainly(sequential_module(chunk=10**6))
    weights = run(tmp_path, "bf16", 2, 2, even_micro_batches, precision="bf16", module=sequential_module)
    torch.testing.assert_close(weights["losses"], plainly["losses"], rtol=0.1, atol=0.01)
    assert not any("backbone" in name for name in weights)


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_a_run_of_two_ranks_is_resumed_by_one(tmp_path, plain, zero_stage):
    run(tmp_path, "shrunk", 2, zero_stage, even_micro_batches, steps=2)
    again = run(tmp_path, "shrunk", 1, zero_stage, even_micro_batches, steps=3, resume_at=2)
    again["losses"] = torch.cat([plain["losses"][:2], again["losses"]])
    assert_same(again, plain)


MUON = {"muon_lr": 0.02, "clip": 0.0}


@pytest.fixture(scope="module")
def plain_muon():
    """Three steps of torch's Muon for matrices and AdamW for the rest."""
    module, losses = step_module(), []
    place, batches = ("store", 0), lambda step, steps: [windows(step, range(8), 3)]
    train = dataclasses.replace(TRAIN, steps=3, warmup=2, **MUON)
    train_here(module, batches, train, "muon", place, watch=lambda _, sums: losses.append(sums.loss / sums.tokens))
    weights = {n: p.detach() for n, p in module.named_parameters() if p.requires_grad}
    return weights | {"losses": torch.stack(losses)}


@pytest.mark.parametrize("zero_stage", [1, 2])
def test_two_ranks_with_muon_train_like_plain_torch(tmp_path, plain_muon, zero_stage):
    weights = run(tmp_path, "two", 2, zero_stage, even_micro_batches, **MUON, steps=3, length=3)
    before = dict(step_module().named_parameters())
    moved = {n: (plain_muon[n] - before[n]).norm() for n in weights if n != "losses"}
    for name, distance in moved.items():  # DeepSpeed orthogonalises in float32, torch in bfloat16
        assert (weights[name] - plain_muon[name]).norm() < 0.25 * distance, name
    torch.testing.assert_close(weights["losses"], plain_muon["losses"], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("zero_stage", [1, 2])
def test_a_resumed_run_with_muon_ends_where_an_undisturbed_one_does(tmp_path, zero_stage):
    whole = run(tmp_path, "whole", 2, zero_stage, even_micro_batches, **MUON)
    run(tmp_path, "resumed", 2, zero_stage, even_micro_batches, steps=2, **MUON)
    again = run(tmp_path, "resumed", 2, zero_stage, even_micro_batches, steps=3, resume_at=2, **MUON)
    again["losses"] = torch.cat([whole["losses"][:2], again["losses"]])
    assert_same(again, whole)


def test_a_run_with_muon_of_two_ranks_is_not_resumed_by_one(tmp_path):
    run(tmp_path, "shrunk", 2, 1, even_micro_batches, steps=2, **MUON)
    config = dataclasses.replace(TRAIN, **MUON)
    strategy.check_workers(tmp_path / "shrunk" / "checkpoints", config)
    with pytest.raises(StageError, match=r"was written by 2 workers, .* to 1: set train.workers=2"):
        strategy.check_workers(tmp_path / "shrunk" / "checkpoints", dataclasses.replace(config, workers=1))


def test_the_loss_sums_of_two_ranks_reduce_to_global_means(tmp_path):
    run_ranks(2, _check_reduce)


def _check_reduce(rank, world):
    logits = torch.zeros(1 + 2 * rank, 1, 2, 4)
    logits[..., 1] = 5.0
    targets = torch.full((1 + 2 * rank, 1, 2), rank)
    sums: LossSums = hard_target_loss(torch.nn.Identity(), logits, targets)
    means = reduce_sums(sums)
    assert means["tokens"] == 8
    assert means["match"] == [0.75, 0.75]
    assert means["block_match"] == 0.75


def test_the_reported_wait_is_that_of_the_rank_that_waited_longest(tmp_path):
    run_ranks(2, _check_wait)


def _check_wait(rank, world):
    told = []
    relay = SimpleNamespace(put=SimpleNamespace(remote=told.append), beat=SimpleNamespace(remote=lambda: None))
    job = SimpleNamespace(stage="k2", rollout_job=None, train=dataclasses.replace(TRAIN, steps=2, log_every=2))
    progress = Progress(job, 0, None if rank else relay)
    progress.mark -= 100
    progress.wait = 10.0 + 30 * rank
    zeros = torch.zeros(2)
    progress.stepped(1, pa.table({}), LossSums(torch.zeros(()), zeros, zeros, torch.zeros(()), 1))
    assert progress.wait == 0
    assert [record["data_wait"] for record in told] == ([] if rank else [pytest.approx(0.4, abs=0.01)])
