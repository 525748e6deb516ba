"""Products of up to 128 rows with a weight matrix, for few of them at the speed at which memory delivers the matrix.

A decoding step multiplies a few rows by every matrix of the model, so it takes at least the time of reading the weights once.
The libraries behind torch reach that time for one row only; 4 rows take them 1.4 to 1.7 times as long. This kernel

* reads a block of rows of the matrix once for all rows of the input, and keeps all sums of the block and of a group of up to
  4 input rows in registers,
* asks the processor for the next block while it works on this one (prefetch instructions),
* adds up each output in an order that does not depend on the number of rows: a row gets bit by bit the same result alone
  and among others.

There is a kernel for each size of a group, compiled when it is first used (15 ms).

Shapes: N rows, K inputs, M outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from kforcing.cpu.compiler import compiled, machine


class WeightType(NamedTuple):
    """How 16 or 8 weights get from memory into a vector of float32."""

    size: int
    """Bytes of a weight."""
    steps: tuple[str, ...]
    """Instructions from the pointer `{p}` to the vector `{v}` of `{n}` numbers."""


WEIGHTS = {
    torch.float32: WeightType(4, ("{v} = load <{n} x float>, ptr {p}, align 4",)),
    torch.bfloat16: WeightType(
        2,
        (
            "{v}.h = load <{n} x i16>, ptr {p}, align 2",
            "{v}.i = zext <{n} x i16> {v}.h to <{n} x i32>",
            "{v}.s = shl <{n} x i32> {v}.i, splat (i32 16)",
            "{v} = bitcast <{n} x i32> {v}.s to <{n} x float>",
        ),
    ),
    torch.int8: WeightType(
        1,
        (
            "{v}.b = load <{n} x i8>, ptr {p}, align 1",
            "{v} = sitofp <{n} x i8> {v}.b to <{n} x float>",
        ),
    ),
}
CACHE_LINE = 64


def can_multiply(weight_MK: Tensor) -> bool:
    """Whether the kernel takes this matrix: contiguous, on a CPU, in a known dtype, at least 8 rows of whole cache lines."""
    if weight_MK.device.type != "cpu" or weight_MK.dtype not in WEIGHTS or not weight_MK.is_contiguous():
        return False
    found = machine()
    if found is None:
        return False
    return len(weight_MK) >= 8 and weight_MK.shape[1] % _inputs_at_once(weight_MK.dtype) == 0


def multiply(x: Tensor, weight_MK: Tensor, scale_M: Tensor | None, out: Tensor, rows: int, stride: int) -> None:
    """Write x · weightᵀ into a tensor.

    Args:
        x: float32, contiguous, (rows, K) or of a shape with as many numbers.
        weight_MK: a matrix that `can_multiply` accepts.
        scale_M: float32; output m is multiplied by scale_M[m]. Needed for int8 weights, not allowed for others.
        out: float32; its rows of M numbers begin `stride` numbers apart.
        rows: at least 1.
    """
    outputs, inputs = weight_MK.shape
    group = -(-rows // -(-rows // GROUP))  # groups of nearly the same size
    _product(group, weight_MK.dtype)(
        x.data_ptr(),
        weight_MK.data_ptr(),
        0 if scale_M is None else scale_M.data_ptr(),
        out.data_ptr(),
        outputs,
        inputs,
        stride,
        rows,
        torch.get_num_threads(),
    )


@cache
def _product(group: int, dtype: torch.dtype) -> Callable[..., None]:
    """The kernel for groups of so many rows.

    A unit of work is a block of B rows of the matrix, which is multiplied by one group of rows after the other. The last
    block and the last group begin early enough to be whole; what they compute again has the same values.
    """
    found = machine()
    assert found is not None
    block = max(1, min(8, found.sums // group))
    shape = Shape(group, block, found.lanes, _inputs_at_once(dtype), WEIGHTS[dtype])
    vector, n = shape.vector, shape.lanes
    units = (f"%M.up = add i64 %M, {block - 1}", f"%units = udiv i64 %M.up, {block}")
    functions = [
        "declare void @llvm.prefetch.p0(ptr, i32, i32, i32)",
        f"declare {vector} @llvm.fma.v{n}f32({vector}, {vector}, {vector})",
        f"declare float @llvm.vector.reduce.fadd.v{n}f32(float, {vector})",
    ]
    body = [*_block(shape), *_inputs(shape), *_store(shape)]
    return compiled(body, ARGUMENTS, functions, units)


def _inputs_at_once(dtype: torch.dtype) -> int:
    return CACHE_LINE // WEIGHTS[dtype].size


ARGUMENTS = {"x": "ptr", "w": "ptr", "scale": "ptr", "y": "ptr", "M": "i64", "K": "i64", "stride": "i64", "rows": "i64"}
"""`stride` is the distance between rows of y, `rows` the number of rows of x and y."""
GROUP = 4
"""Rows of a group: more of them would leave few registers for rows of weights, and a product would wait for loads of x."""
MOST_ROWS = 128
"""Rows up to which the products are faster than torch's: 16 rows by a factor of 2, 128 by 1.2."""


class Shape(NamedTuple):
    """The constants of a kernel."""

    N: int
    """Rows of x in a group."""
    B: int
    """Rows of the weights in a block."""
    lanes: int
    at_once: int
    """Inputs that a turn of the inner loop takes: those of one cache line of weights."""
    weight: WeightType

    @property
    def vector(self) -> str:
        """LLVM's name of the type of a vector."""
        return f"<{self.lanes} x float>"

    @property
    def last_part(self) -> int:
        """Where the last vector of a turn begins."""
        return self.at_once - self.lanes


def _block(shape: Shape) -> list[str]:
    """The loops over blocks and groups begin: pointers to the rows of the weights (w) and of the input (x)."""
    code = [
        "work:",
        "%b = phi i64 [%first, %entry], [%b.next, %block.done]",
        f"%m.most = sub i64 %M, {shape.B}",
        f"%ahead = mul i64 %K, {shape.B * shape.weight.size}",
        f"%m.b = mul i64 %b, {shape.B}",
        "%over = icmp ugt i64 %m.b, %m.most",
        "%m = select i1 %over, i64 %m.most, i64 %m.b",
    ]
    for j in range(shape.B):
        code += [f"%m{j} = add i64 %m, {j}", f"%mK{j} = mul i64 %m{j}, %K"]
        code += [f"%mKs{j} = mul i64 %mK{j}, {shape.weight.size}", f"%w{j} = getelementptr i8, ptr %w, i64 %mKs{j}"]
    code += [
        "br label %group",
        "group:",
        "%g = phi i64 [0, %work], [%g.next, %store]",
        f"%r.most = sub i64 %rows, {shape.N}",
        "%g.over = icmp ugt i64 %g, %r.most",
        "%r = select i1 %g.over, i64 %r.most, i64 %g",
    ]
    for i in range(shape.N):
        code += [f"%r{i} = add i64 %r, {i}", f"%rK{i} = mul i64 %K, %r{i}"]
        code.append(f"%x{i} = getelementptr float, ptr %x, i64 %rK{i}")
    return [*code, "br label %inputs"]


def _inputs(shape: Shape) -> list[str]:
    """The loop over inputs: all sums of the block, from one cache line of each of its rows a turn."""
    vector, places = shape.vector, [(i, j) for i in range(shape.N) for j in range(shape.B)]
    code = ["inputs:", "%k = phi i64 [0, %group], [%k.next, %inputs]"]
    for i, j in places:
        after = f"%sum{i}.{j}.{shape.last_part}"
        code.append(f"%sum{i}.{j}.before = phi {vector} [zeroinitializer, %group], [{after}, %inputs]")
    code.append(f"%k.bytes = mul i64 %k, {shape.weight.size}")
    for j in range(shape.B):
        code += [
            f"%wk{j} = getelementptr i8, ptr %w{j}, i64 %k.bytes",
            f"%next{j} = getelementptr i8, ptr %wk{j}, i64 %ahead",
            f"call void @llvm.prefetch.p0(ptr %next{j}, i32 0, i32 3, i32 1)",
        ]
    for part in range(0, shape.at_once, shape.lanes):
        for j in range(shape.B):
            pointer, value = f"%wp{j}.{part}", f"%wv{j}.{part}"
            code.append(f"{pointer} = getelementptr i8, ptr %wk{j}, i64 {part * shape.weight.size}")
            code += [step.format(v=value, p=pointer, n=shape.lanes) for step in shape.weight.steps]
        for i in range(shape.N):
            code += [
                f"%xk{i}.{part} = getelementptr float, ptr %x{i}, i64 %k",
                f"%xp{i}.{part} = getelementptr float, ptr %xk{i}.{part}, i64 {part}",
                f"%xv{i}.{part} = load {vector}, ptr %xp{i}.{part}, align 4",
            ]
        for i, j in places:
            before = f"%sum{i}.{j}.{part - shape.lanes if part else 'before'}"
            terms = f"{vector} %wv{j}.{part}, {vector} %xv{i}.{part}, {vector} {before}"
            code.append(f"%sum{i}.{j}.{part} = call {vector} @llvm.fma.v{shape.lanes}f32({terms})")
    return [
        *code,
        f"%k.next = add i64 %k, {shape.at_once}",
        "%more = icmp ult i64 %k.next, %K",
        "br i1 %more, label %inputs, label %store",
    ]


def _store(shape: Shape) -> list[str]:
    """The outputs of a group, scaled where the weights have scales, and the ends of the loops over groups and blocks."""
    code, scaled = ["store:"], shape.weight is WEIGHTS[torch.int8]
    for j in range(shape.B) if scaled else ():
        code += [f"%sp{j} = getelementptr float, ptr %scale, i64 %m{j}", f"%sv{j} = load float, ptr %sp{j}"]
    reduce = f"call reassoc float @llvm.vector.reduce.fadd.v{shape.lanes}f32"
    for i in range(shape.N):
        code += [f"%row{i} = mul i64 %stride, %r{i}", f"%y{i} = getelementptr float, ptr %y, i64 %row{i}"]
        for j in range(shape.B):
            total = f"%total{i}.{j}"
            code.append(f"{total} = {reduce}(float 0.0, {shape.vector} %sum{i}.{j}.{shape.last_part})")
            if scaled:
                code.append(f"{total}.s = fmul float {total}, %sv{j}")
                total += ".s"
            code += [f"%yp{i}.{j} = getelementptr float, ptr %y{i}, i64 %m{j}", f"store float {total}, ptr %yp{i}.{j}"]
    return [
        *code,
        f"%g.next = add i64 %g, {shape.N}",
        "%g.again = icmp ult i64 %g.next, %rows",
        "br i1 %g.again, label %group, label %block.done",
        "block.done:",
        "%b.next = add i64 %b, 1",
        "%again = icmp ult i64 %b.next, %last",
        "br i1 %again, label %work, label %done",
    ]
