"""Linear maps for decoding on a CPU: up to 128 rows go through `cpu/products.py`, more through torch.

`row_copy` gives a model such maps. They share the weights of the model, or hold them as int8 with one scale an output:

    W ≈ scale · round(W / scale),   scale = max |W| / 127 of each row of W

Shapes: N rows, K inputs, M outputs.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from kforcing.cpu.compiler import machine
from kforcing.cpu.products import MOST_ROWS, can_multiply, multiply

Model = TypeVar("Model", bound=nn.Module)


class RowLinear(nn.Linear):
    """A linear map for inference. Sums are float32; results have the dtype of the input. `row_copy` makes it."""

    scale_M: Tensor | None = None
    """Where the weight is int8, what its rows are multiplied by."""
    most_rows = 0
    """Rows up to which the kernel is used."""

    def prepare(self, int8: bool) -> None:
        """Quantise the weight where that is asked for, and look whether the kernel takes it."""
        if int8:
            weight_MK, self.scale_M = quantise(self.weight.detach())
            self.weight = nn.Parameter(weight_MK, requires_grad=False)
        self.most_rows = MOST_ROWS if can_multiply(self.weight) else 0

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) → (..., out)."""
        rows = x.numel() // self.in_features
        if not few(x, rows, self.most_rows):
            weight_MK = self.weight if self.scale_M is None else (self.weight * self.scale_M[:, None]).to(x.dtype)
            return linear(x, weight_MK, self.bias)
        out = torch.empty(*x.shape[:-1], self.out_features, dtype=torch.float32, device="cpu")
        self.write(x, out, rows, self.out_features)
        return out if x.dtype == torch.float32 else out.to(x.dtype)

    def write(self, x: Tensor, out: Tensor, rows: int, stride: int) -> None:
        """Put the outputs of at most `most_rows` rows into a float32 tensor whose rows are `stride` numbers apart."""
        x = x if x.dtype == torch.float32 else x.float()  # torch takes longer to see that there is nothing to do
        multiply(x.contiguous(), self.weight, self.scale_M, out, rows, stride)
        if self.bias is not None:
            out.add_(self.bias)

    def rows(self, ids: Tensor) -> Tensor:
        """The rows of the weight with these numbers, as floating-point numbers: (...) → (..., in)."""
        return self.weight[ids] if self.scale_M is None else self.weight[ids] * self.scale_M[ids][..., None]


def few(x: Tensor, rows: int, most: int) -> bool:
    """Whether the kernel takes these rows: it makes no gradients."""
    return 0 < rows <= most and x.device.type == "cpu" and not torch.is_grad_enabled()


def quantise(weight_MK: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix as int8 and the float32 scale of each of its rows."""
    scale_M = weight_MK.float().abs().amax(dim=1).clamp(min=1e-12) / 127
    return (weight_MK / scale_M[:, None]).round().to(torch.int8), scale_M


def can_use_kernel(model: nn.Module) -> bool:
    """Whether the kernel can run for this model: fp32 or bf16, on a CPU for which LLVM makes code."""
    parameter = next(model.parameters())
    known = parameter.dtype in (torch.float32, torch.bfloat16)
    return parameter.device.type == "cpu" and known and machine() is not None


def row_copy(model: Model, int8: bool = False) -> Model:
    """The same model with the same parameters and `RowLinear` maps; the original is left as it is.

    Args:
        int8: hold the weights of all linear maps as int8, in memory of their own. Embeddings stay as they are.
    """
    tensors = itertools.chain(model.parameters(), model.buffers())
    clone = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    for module in clone.modules():
        if type(module) is nn.Linear:
            module.__class__ = RowLinear
            cast(RowLinear, module).prepare(int8)
    return clone


class Joined:
    """Linear maps of one input, whose outputs for few rows lie side by side in one tensor."""

    def __init__(self, maps: Sequence[Any]):
        self.maps = maps
        kernel = all(isinstance(m, RowLinear) for m in maps)
        self.most_rows = min(m.most_rows for m in maps) if kernel else 0
        self._sizes = [m.out_features for m in maps] if kernel else []

    def whole(self, x_ND: Tensor) -> Tensor:
        """(N, in) → (N, all outputs side by side)."""
        if not few(x_ND, len(x_ND), self.most_rows):
            return torch.cat([m(x_ND) for m in self.maps], dim=-1)
        width = sum(self._sizes)
        out = torch.empty(len(x_ND), width, dtype=torch.float32, device="cpu")
        for m, part in zip(self.maps, out.split(self._sizes, dim=-1), strict=True):
            m.write(x_ND, part, len(x_ND), width)
        return out if x_ND.dtype == torch.float32 else out.to(x_ND.dtype)

    def parts(self, x_ND: Tensor) -> Sequence[Tensor]:
        """(N, in) → the output of each map."""
        if not few(x_ND, len(x_ND), self.most_rows):
            return [m(x_ND) for m in self.maps]
        return self.whole(x_ND).split(self._sizes, dim=-1)
