"""A training in one process continues from its file, and starts anew when that file is damaged."""

import contextlib
import dataclasses

import pytest
import torch

from kforcing.distillation.losses import LossSums
from pipelines.config.schema import TrainConfig
from pipelines.training import single_process
from pipelines.training.single_process import train_here

TRAIN = TrainConfig(batch=1, micro_batch=1, lr=0.1, steps=6, warmup=1, schedule="constant", ema=0.5)


class Squares(torch.nn.Linear):
    """The mean square of a map's outputs as a loss."""

    def forward(self, x):
        loss = super().forward(x).square().mean()
        return LossSums(loss, torch.zeros(1), torch.zeros(1), torch.zeros(()), 1)


def trained(checkpoint, steps, killed_at=None):
    """The weights after `steps` steps, and the number of steps that were made in this process."""
    torch.manual_seed(0)
    module, seen = Squares(3, 2), []

    def watch(step, _):
        seen.append(step)
        if step == killed_at:
            raise KeyboardInterrupt

    def batches(step, _):
        return [torch.randn(4, 3, generator=torch.Generator().manual_seed(step))]

    train = dataclasses.replace(TRAIN, steps=steps)
    with contextlib.suppress(KeyboardInterrupt):
        train_here(module, batches, train, "squares", ("store", 0), checkpoint, watch)
    return module.weight.detach(), seen


@pytest.fixture(autouse=True)
def kept_each_step(monkeypatch):
    monkeypatch.setattr(single_process, "KEEP_EVERY_S", -1.0)


def cut(content):
    return content[: len(content) // 2]


def flipped(content):
    weights = content.index(b"data/0") + 200
    return content[:weights] + bytes([content[weights] ^ 1]) + content[weights + 1 :]


@pytest.mark.parametrize("damage", [lambda content: b"", cut, flipped])
def test_a_damaged_file_is_named_and_the_training_ends_as_an_undisturbed_one_does(tmp_path, damage, caplog):
    file = tmp_path / "training.pt"
    whole, _ = trained(None, 6)
    trained(file, 6, killed_at=3)
    kept = file.read_bytes()
    continued, seen = trained(file, 6)
    assert torch.equal(continued, whole)
    assert seen == [3, 4, 5]
    assert not file.exists()
    file.write_bytes(damage(kept))
    again, seen = trained(file, 6)
    assert torch.equal(again, whole)
    assert seen == list(range(6))
    assert f"{file} does not hold what was written to it; its training starts anew" in caplog.text


class Recording(Squares):
    """Keeps the type of its products."""

    def forward(self, x):
        self.products = (x @ self.weight.T).dtype
        return super().forward(x)


@pytest.mark.parametrize(("precision", "products"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_with_bf16_products_are_rounded_and_weights_stay_in_fp32(precision, products):
    module = Recording(64, 2)
    train = dataclasses.replace(TRAIN, steps=1, warmup=0, precision=precision)
    train_here(module, lambda *_: [torch.ones(4, 64)], train, "squares", ("store", 0))
    assert module.products == products
    assert module.weight.dtype == torch.float32
