"""Weights in the order in which the CPU's matrix kernels (oneDNN) read them.

For the few rows of a decoding step that is 2 to 4 times as fast as the stock layout: 0.26 against 0.77 ms for 4 rows of a
768 × 2,304 matrix in fp32 on two cores, near what memory gives. It costs a second copy of the matrices. A single row takes the
stock layout, which reads its bytes at the memory's speed and has less to set up.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)

ROWS = 16
"""Rows the layout is chosen for; the choice for one row is slow for many, this one is good for 1 to 128."""


class PackedLinear(nn.Linear):
    """A linear map with its weight packed at the first call. Not for training: it does not see the weight change."""

    _packed: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) → (..., out)."""
        if _single(x):
            return super().forward(x)
        if self._packed is None:
            self._packed = _pack(self.weight)
        return _apply(x, self._packed, self.bias)


def _single(x: Tensor) -> bool:
    return x.numel() == x.shape[-1]


def _pack(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), ROWS)


def _apply(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def can_pack(model: nn.Module) -> bool:
    """Whether the model is where packing helps: fp32 or bf16 on a CPU, in a build of torch that has oneDNN."""
    parameter = next(model.parameters())
    return (
        parameter.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and (
            parameter.dtype == torch.float32
            or (parameter.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
        )
    )


def packed_copy(model: Model) -> Model:
    """The same model with the same parameters, its linear maps packed; the original is left as it is."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    clone = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    for module in clone.modules():
        if type(module) is nn.Linear:
            module.__class__ = PackedLinear
    return clone


def joined(maps: Sequence[nn.Module]) -> Callable[[Tensor], Sequence[Tensor]]:
    """Linear maps of one input: packed ones as a single product, others one by one."""
    if not all(type(m) is PackedLinear for m in maps):
        return lambda x: [m(x) for m in maps]
    weights: list[Any] = [m.weight for m in maps]
    biases: list[Any] = [m.bias for m in maps]
    sizes = [len(weight) for weight in weights]
    bias = None if biases[0] is None else torch.cat(biases).detach()
    packed = _pack(torch.cat(weights))

    def product(x: Tensor) -> Sequence[Tensor]:
        return [m(x) for m in maps] if _single(x) else _apply(x, packed, bias).split(sizes, dim=-1)

    return product
