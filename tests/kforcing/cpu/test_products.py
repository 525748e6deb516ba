"""The kernel for few rows and the linear maps that use it."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from kforcing.backbone import random_llama
from kforcing.cpu.products import MOST_ROWS, can_multiply, multiply
from kforcing.engine.config import EngineConfig
from kforcing.engine.engine import Engine
from kforcing.engine.linear import Joined, RowLinear, quantise, row_copy
from kforcing.engine.request import Request, SamplingParams
from tests.models import make_sequential, needs_kernels

pytestmark = needs_kernels
SOME = [*range(1, 11), 16, 21, MOST_ROWS - 1]


def weights(dtype: torch.dtype, outputs: int = 203, inputs: int = 192) -> tuple[torch.Tensor, torch.Tensor | None]:
    matrix = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(1))
    return quantise(matrix) if dtype is torch.int8 else (matrix.to(dtype), None)


def product(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    out = torch.full((len(x), len(weight)), torch.nan)
    multiply(x, weight, scale, out, len(x), len(weight))
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_the_product_equals_that_in_double_precision(dtype):
    weight, scale = weights(dtype)
    exact = weight.double() if scale is None else weight.double() * scale.double()[:, None]
    for rows in SOME:
        x = torch.randn(rows, weight.shape[1], generator=torch.Generator().manual_seed(rows))
        torch.testing.assert_close(product(x, weight, scale).double(), x.double() @ exact.T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_a_row_has_bitwise_the_same_result_alone_and_among_others(dtype):
    weight, scale = weights(dtype)
    x = torch.randn(MOST_ROWS, weight.shape[1], generator=torch.Generator().manual_seed(0))
    alone = torch.cat([product(row[None], weight, scale) for row in x])
    for rows in SOME:
        assert torch.equal(product(x[:rows], weight, scale), alone[:rows])


def test_the_product_can_be_written_into_some_columns_of_a_tensor():
    weight, _ = weights(torch.float32)
    x, out = torch.randn(3, weight.shape[1]), torch.zeros(3, len(weight) + 20)
    multiply(x, weight, None, out[:, 10:-10], 3, out.shape[1])
    assert torch.equal(out[:, 10:-10], product(x, weight, None))
    assert out[:, :10].count_nonzero() == out[:, -10:].count_nonzero() == 0


@pytest.mark.parametrize("threads", [1, 2])
def test_the_number_of_threads_does_not_change_the_result(threads):
    weight, _ = weights(torch.float32, outputs=11)
    x, before = torch.randn(4, weight.shape[1], generator=torch.Generator().manual_seed(0)), torch.get_num_threads()
    expected = product(x, weight, None)
    torch.set_num_threads(threads)
    try:
        assert torch.equal(product(x, weight, None), expected)
    finally:
        torch.set_num_threads(before)


def test_matrices_that_the_kernel_does_not_take_are_multiplied_by_torch():
    assert not can_multiply(torch.zeros(64, 50))  # 50 numbers do not fill cache lines
    assert not can_multiply(torch.zeros(64, 128).T)
    assert not can_multiply(torch.zeros(64, 128, dtype=torch.float16))
    (odd,) = row_copy(nn.Sequential(nn.Linear(50, 64)))
    x = torch.randn(3, 50)
    assert odd.most_rows == 0
    assert torch.equal(odd(x), nn.functional.linear(x, odd.weight, odd.bias))


@pytest.mark.parametrize("int8", [False, True])
def test_few_and_many_rows_agree_with_the_original_map(int8):
    original = nn.Linear(192, 100)
    (copied,) = row_copy(nn.Sequential(original), int8)
    assert type(original) is nn.Linear
    assert isinstance(copied, RowLinear)
    with torch.inference_mode():
        for shape in ((1, 192), (2, 3, 192), (MOST_ROWS + 1, 192)):
            x = torch.randn(shape)
            torch.testing.assert_close(copied(x), original(x), rtol=0, atol=0.02 if int8 else 1e-5)


def test_a_copy_of_a_model_with_these_maps_has_its_own_weights_and_another_default_dtype_does_no_harm():
    (copied,) = row_copy(nn.Sequential(nn.Linear(192, 100)))
    twin, x = copy.deepcopy(copied), torch.randn(3, 192)
    with torch.inference_mode():
        expected = copied(x).clone()
        copied.weight.zero_()
        torch.set_default_dtype(torch.bfloat16)
        try:
            assert torch.equal(twin(x), expected)
        finally:
            torch.set_default_dtype(torch.float32)
        assert twin(x[:0]).shape == (0, 100)


def test_gradients_are_those_of_torch():
    (copied,) = row_copy(nn.Sequential(nn.Linear(192, 100)))
    x = torch.randn(3, 192, requires_grad=True)
    copied(x).sum().backward()
    torch.testing.assert_close(x.grad, copied.weight.sum(dim=0).expand(3, -1))


def test_int8_weights_differ_by_at_most_half_a_step_of_their_row():
    weight, scale = weights(torch.float32)[0], quantise(weights(torch.float32)[0])
    restored = scale[0] * scale[1][:, None]
    assert ((restored - weight).abs() <= scale[1][:, None] * 0.5001).all()
    map_ = row_copy(nn.Sequential(nn.Linear(192, 100)), int8=True)[0]
    ids = torch.tensor([[3, 7]])
    assert torch.equal(map_.rows(ids), map_.weight[ids] * map_.scale_M[ids][..., None])


def test_joined_maps_give_the_outputs_of_each():
    maps = list(row_copy(nn.Sequential(nn.Linear(64, 32), nn.Linear(64, 48, bias=False))))
    with torch.inference_mode():
        for rows in (1, 3, 9, MOST_ROWS + 1):
            x = torch.randn(rows, 64)
            for joined, alone in zip(Joined(maps).parts(x), maps, strict=True):
                torch.testing.assert_close(joined, alone(x))
            torch.testing.assert_close(Joined(maps).whole(x), torch.cat([m(x) for m in maps], dim=-1))


SMALL = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL |= {"num_key_value_heads": 2, "intermediate_size": 128, "max_position_embeddings": 128}


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_exact_mode_with_the_kernel_gives_the_text_of_its_ar_model(quantization):
    model, repeated = random_llama(**SMALL), [7, 8, 9, 7, 8, 9, 7, 8]
    texts = []
    for k in (1, 4):
        config = EngineConfig(4, 64, k=k, acceptance="exact", quantization=quantization, coupling="gumbel")
        requests = [Request(repeated[i:], 40, seed=i, sampling=SamplingParams(temperature=0.3 * i)) for i in range(4)]
        texts.append([c.tokens for c in Engine(model, config).generate(requests)])
    assert texts[0] == texts[1]


def test_a_student_in_bf16_with_int8_weights_and_a_low_rank_head_decodes():
    student = make_sequential(random_llama(**SMALL), 3, hint_layers=1, draft_rank=16, shortlist=8).bfloat16()
    config = EngineConfig(2, 64, acceptance="exact", quantization="int8")
    (done,) = Engine(student, config).generate([Request([3, 4, 5], 12, seed=1)])
    assert len(done.tokens) == 12


def test_int8_with_settings_that_exclude_it_is_refused():
    model = random_llama(**SMALL)
    with pytest.raises(ValueError, match="quantization=int4: choose int8"):
        Engine(model, EngineConfig(2, 64, quantization="int4"))
    with pytest.raises(ValueError, match="quantization=int8 needs the kernel of CPUs"):
        Engine(model, EngineConfig(2, 64, quantization="int8", row_kernel=False))
    with pytest.raises(ValueError, match="quantization=int8 needs a model in fp32 or bf16 on a CPU"):
        Engine(model, EngineConfig(2, 64, quantization="int8", compiled=True))


def test_verified_drafts_may_come_from_weights_of_8_bits_and_change_no_text():
    student = make_sequential(random_llama(**SMALL), 4, hint_layers=1, shortlist=8, draft_rank=16)
    mixed = [Request([i + 3] * 5, 30, seed=i, acceptance=("exact", "exact", "fixed")[i]) for i in range(3)]
    texts, drafts = [], []
    for int8 in (True, False):
        engine = Engine(student, EngineConfig(3, 64, acceptance="exact", int8_drafts=int8))
        assert (engine.runner.drafter is not None) == int8
        texts.append([c.tokens for c in engine.generate(mixed[:2]) + engine.generate(mixed)])
        drafts.append(engine.runner.drafter)
    assert texts[0] == texts[1]
    light: Any = drafts[0]
    assert light.block.qkv.weight.dtype == light.candidates.up.weight.dtype == torch.int8
    assert student.readout.block.qkv.weight.dtype == torch.float32
    assert Engine(student, EngineConfig(3, 64)).runner.drafter is None
    for options in ({"row_kernel": False}, {"batch_invariant": True}, {"k": 1}):
        assert Engine(student, EngineConfig(3, 64, acceptance="exact", **options)).runner.drafter is None
        with pytest.raises(ValueError, match="int8_drafts=True needs a sequential student"):
            Engine(student, EngineConfig(3, 64, acceptance="exact", int8_drafts=True, **options))
