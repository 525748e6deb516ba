"""What stands between the products of a Llama layer, one pass each: RMS norm, rotary positions, the gate of the MLP.

A step of a small model calls each of them once or twice a layer on a few rows, where torch's operations take 6 to 15 µs and
these 3. Each row is treated alike, whatever the number of rows.

Shapes: N rows, D width, A heads side by side, H those that turn, E width of a head, I inner width.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from kforcing.cpu.compiler import FIRST_ROW, compiled, everywhere, lanes, machine, next_row, splat

LOG2_E = 1.4426950408889634
EXP2 = (1.0, 0.6931469775973305, 0.24022242082677497, 0.05550733744824601, 0.00967151281249456, 0.0013264727213721712)
"""Coefficients of a polynomial that is 2ˣ for |x| ≤ 1/2 with a relative error of 1.1 · 10⁻⁷."""


def can_run(tensor: Tensor, *inner: int) -> bool:
    """Whether the kernels take float32 tensors like this one, whose rows (and halves of heads) have these lengths."""
    found = machine() if tensor.dtype == torch.float32 and tensor.device.type == "cpu" else None
    return found is not None and all(length % found.lanes == 0 for length in inner)


def normed(x_ND: Tensor, gain_D: Tensor, eps: float) -> Tensor:
    """x / √(mean of x² + eps) · gain of each row of a contiguous tensor."""
    out_ND = torch.empty_like(x_ND)
    D = x_ND.shape[-1]
    _norm()(x_ND.data_ptr(), gain_D.data_ptr(), out_ND.data_ptr(), x_ND.numel() // D, D, eps, 1)
    return out_ND


def turn(heads_NAE: Tensor, H: int, cos_NE: Tensor, sin_NE: Tensor) -> None:
    """Rotary positions of the first H heads, in place: x · cos + (x with its halves exchanged) · sin.

    Args:
        cos_NE, sin_NE: the first half of `sin_NE` has the sign of rotate-half. All are contiguous.
    """
    N, A, E = heads_NAE.shape
    _turn()(heads_NAE.data_ptr(), cos_NE.data_ptr(), sin_NE.data_ptr(), N, A, H, E, 1)


def gated(gate_NI: Tensor, up_NI: Tensor) -> Tensor:
    """silu(gate) · up; both are contiguous, or columns of tensors of one width."""
    out_NI = torch.empty_like(gate_NI, memory_format=torch.contiguous_format)
    N, inner = gate_NI.shape
    _gate()(gate_NI.data_ptr(), up_NI.data_ptr(), out_NI.data_ptr(), N, inner, gate_NI.stride(0), 1)
    return out_NI


@cache
def _norm() -> Any:
    n = lanes()
    f = f"<{n} x float>"
    arguments = {"x": "ptr", "gain": "ptr", "y": "ptr", "units": "i64", "D": "i64", "eps": "float"}
    functions = [f"declare {f} @llvm.fma.v{n}f32({f}, {f}, {f})"]
    functions += [f"declare float @llvm.vector.reduce.fadd.v{n}f32(float, {f})", "declare float @llvm.sqrt.f32(float)"]
    body = [
        *_begin({"x": "D", "y": "D"}),
        "br label %sum",
        *_loop("sum", "work", [f"%square = phi {f} [zeroinitializer, %work], [%square.next, %sum]"]),
        *_load("xv", "x.row", "sum.i", f),
        f"%square.next = call {f} @llvm.fma.v{n}f32({f} %xv, {f} %xv, {f} %square)",
        *_repeat("sum", "D", n, "scale"),
        "scale:",
        f"%total = call reassoc float @llvm.vector.reduce.fadd.v{n}f32(float 0.0, {f} %square.next)",
        "%size = uitofp i64 %D to float",
        "%mean = fdiv float %total, %size",
        "%mean.eps = fadd float %mean, %eps",
        "%root = call float @llvm.sqrt.f32(float %mean.eps)",
        "%factor = fdiv float 1.0, %root",
        *everywhere("%factor", "%factor.v"),
        "br label %put",
        *_loop("put", "scale", []),
        *_load("xw", "x.row", "put.i", f),
        *_load("g", "gain", "put.i", f),
        f"%scaled = fmul {f} %xw, %factor.v",
        f"%out = fmul {f} %scaled, %g",
        *_put("out", "y.row", "put.i", f),
        *_repeat("put", "D", n, "row.done"),
        *next_row(),
    ]
    return compiled(body, arguments, functions)


@cache
def _turn() -> Any:
    n = lanes()
    f = f"<{n} x float>"
    arguments = {"x": "ptr", "cos": "ptr", "sin": "ptr", "units": "i64", "A": "i64", "H": "i64", "E": "i64"}
    code = []
    for name, table in (("cos", "cos.row"), ("sin", "sin.row")):
        code += [*_load(f"{name}.a", table, "pair.i", f), *_load(f"{name}.b", table, "j", f)]
    body = [
        *_begin({"cos": "E", "sin": "E"}),
        "%half = lshr i64 %E, 1",
        "%AE = mul i64 %A, %E",
        "%first.x = mul i64 %r, %AE",
        "%x.row = getelementptr float, ptr %x, i64 %first.x",
        "br label %head",
        "head:",
        "%h = phi i64 [0, %work], [%h.next, %head.done]",
        "%hE = mul i64 %h, %E",
        "%x.head = getelementptr float, ptr %x.row, i64 %hE",
        "br label %pair",
        *_loop("pair", "head", []),
        "%j = add i64 %pair.i, %half",
        *_load("a", "x.head", "pair.i", f),
        *_load("b", "x.head", "j", f),
        *code,
        f"%ac = fmul {f} %a, %cos.a",
        f"%bs = fmul {f} %b, %sin.a",
        f"%a.new = fadd {f} %ac, %bs",
        f"%bc = fmul {f} %b, %cos.b",
        f"%as = fmul {f} %a, %sin.b",
        f"%b.new = fadd {f} %bc, %as",
        *_put("a.new", "x.head", "pair.i", f),
        *_put("b.new", "x.head", "j", f),
        *_repeat("pair", "half", n, "head.done"),
        "head.done:",
        "%h.next = add i64 %h, 1",
        "%h.more = icmp ult i64 %h.next, %H",
        "br i1 %h.more, label %head, label %row.done",
        *next_row(),
    ]
    return compiled(body, arguments, [])


@cache
def _gate() -> Any:
    """silu(x) = x / (1 + 2^(−x · log2 e)), the power from its whole part as an exponent and a polynomial of the rest."""
    n = lanes()
    f = f"<{n} x float>"
    i = f"<{n} x i32>"
    arguments = {"gate": "ptr", "up": "ptr", "y": "ptr", "units": "i64", "I": "i64", "stride": "i64"}
    functions = [f"declare {f} @llvm.rint.v{n}f32({f})", f"declare {f} @llvm.fma.v{n}f32({f}, {f}, {f})"]
    functions += [f"declare {f} @llvm.{name}.v{n}f32({f}, {f})" for name in ("maxnum", "minnum")]
    polynomial, value = [], splat(EXP2[-1])
    for power in range(len(EXP2) - 2, -1, -1):
        polynomial.append(f"%p{power} = call {f} @llvm.fma.v{n}f32({f} {value}, {f} %rest, {f} {splat(EXP2[power])})")
        value = f"%p{power}"
    body = [
        *_begin({"gate": "stride", "up": "stride", "y": "I"}),
        "br label %inner",
        *_loop("inner", "work", []),
        *_load("x", "gate.row", "inner.i", f),
        *_load("u", "up.row", "inner.i", f),
        f"%e = fmul {f} %x, {splat(-LOG2_E)}",
        f"%e.low = call {f} @llvm.maxnum.v{n}f32({f} %e, {f} {splat(-126.0)})",
        f"%e.in = call {f} @llvm.minnum.v{n}f32({f} %e.low, {f} {splat(126.0)})",
        f"%whole = call {f} @llvm.rint.v{n}f32({f} %e.in)",
        f"%rest = fsub {f} %e.in, %whole",
        *polynomial,
        f"%whole.i = fptosi {f} %whole to {i}",
        f"%biased = add {i} %whole.i, {splat(127)}",
        f"%exponent = shl {i} %biased, {splat(23)}",
        f"%power = bitcast {i} %exponent to {f}",
        f"%exp = fmul {f} {value}, %power",
        f"%below = fadd {f} %exp, {splat(1.0)}",
        f"%silu = fdiv {f} %x, %below",
        f"%out = fmul {f} %silu, %u",
        *_put("out", "y.row", "inner.i", f),
        *_repeat("inner", "I", n, "row.done"),
        *next_row(),
    ]
    return compiled(body, arguments, functions)


def _begin(rows: dict[str, str]) -> list[str]:
    """The loop over rows begins: a pointer to the row of each tensor, whose rows are so far from each other."""
    code = list(FIRST_ROW)
    for name, length in rows.items():
        code += [
            f"%{name}.at = mul i64 %r, %{length}",
            f"%{name}.row = getelementptr float, ptr %{name}, i64 %{name}.at",
        ]
    return code


def _loop(label: str, before: str, state: list[str]) -> list[str]:
    return [f"{label}:", f"%{label}.i = phi i64 [0, %{before}], [%{label}.i.next, %{label}]", *state]


def _repeat(label: str, end: str, n: int, after: str) -> list[str]:
    counter = f"{label}.i"
    return [
        f"%{counter}.next = add i64 %{counter}, {n}",
        f"%{counter}.more = icmp ult i64 %{counter}.next, %{end}",
        f"br i1 %{counter}.more, label %{label}, label %{after}",
    ]


def _load(name: str, row: str, at: str, vector: str) -> list[str]:
    pointer = f"%{name}.p = getelementptr float, ptr %{row}, i64 %{at}"
    return [pointer, f"%{name} = load {vector}, ptr %{name}.p, align 4"]


def _put(name: str, row: str, at: str, vector: str) -> list[str]:
    return [
        f"%{name}.put = getelementptr float, ptr %{row}, i64 %{at}",
        f"store {vector} %{name}, ptr %{name}.put, align 4",
    ]
