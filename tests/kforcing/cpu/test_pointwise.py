"""The kernels between the products of a Llama layer."""

import pytest
import torch
from torch.nn.functional import rms_norm, silu
from torch.testing import assert_close

from kforcing.cpu.pointwise import can_run, gated, normed, turn
from tests.models import needs_kernels

pytestmark = needs_kernels


@pytest.fixture(params=[1, 3, 40])
def rows(request):
    torch.manual_seed(request.param)
    return request.param


def test_the_norm_is_that_of_torch(rows):
    x, gain = torch.randn(rows, 96), torch.randn(96)
    assert_close(normed(x, gain, 1e-5), rms_norm(x, (96,), gain, 1e-5), rtol=1e-6, atol=1e-6)
    assert torch.equal(normed(x, gain, 1e-5)[-1:], normed(x[-1:], gain, 1e-5))


def test_rotary_positions_turn_the_first_heads_and_leave_the_others(rows):
    heads, cos, sin = torch.randn(rows, 5, 64), torch.randn(rows, 64), torch.randn(rows, 64)
    exchanged = torch.cat([heads[..., 32:], heads[..., :32]], dim=-1)
    expected = torch.cat([(heads * cos[:, None] + exchanged * sin[:, None])[:, :3], heads[:, 3:]], dim=1)
    turn(heads, 3, cos, sin)
    assert_close(heads, expected, rtol=1e-6, atol=1e-6)


def test_the_gate_is_silu_times_the_other_input_at_all_sizes_of_numbers(rows):
    both = torch.randn(rows, 128) * 20
    both[0, :4] = torch.tensor([0.0, -200.0, 200.0, 1e-20])
    gate, up = both.split([64, 64], dim=-1)
    assert_close(gated(gate, up), silu(gate) * up, rtol=1e-5, atol=1e-30)
    assert_close(gated(gate.contiguous(), up.contiguous()), silu(gate) * up, rtol=1e-5, atol=1e-30)


def test_other_dtypes_and_lengths_are_left_to_torch():
    assert can_run(torch.zeros(1), 64, 32)
    assert not can_run(torch.zeros(1), 64, 20)
    assert not can_run(torch.zeros(1, dtype=torch.bfloat16), 64)
