"""The tokens of each row that may win a Gumbel-max draw, or be among its best: the others need no logarithms.

A token's score is l/T − log(e), e = −log1p(−w), with w the token's noise in (0, 1) (see `kforcing.coupling.gumbel_max`). One
pass over the logits computes an upper bound of each score from the bits of w as a float, which approximate log2(w):

    bits(w) / 2²³ − 127 ≤ log2(w) ≤ bits(w) / 2²³ − 127 + 0.0861,   and   w ≤ e ≤ 1.387 w  for w ≤ 1/2

so a score is at most U = l/T − ln 2 · (bits(w) / 2²³ − 127), and at least U − 0.387 where w ≤ 1/2. A second pass keeps the
tokens with U ≥ best − 0.45. For the winner, `best` is the largest U with w ≤ 1/2. For the best 64, it is the smallest among
the largest U of 64 groups of tokens (by id modulo 64), since 64 tokens have at least that. One or two tokens are left for
the winner, about 500 for the best 64.

Shapes: R rows, V vocabulary, n tokens left of a row at most.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from kforcing.cpu.compiler import (
    FIRST_ROW,
    compiled,
    everywhere,
    float_constant,
    lanes,
    machine,
    next_row,
    splat,
)
from kforcing.noise import RACE_LAST_SHIFT, RACE_ROUNDS, RACE_STRIDE, race_words

GROUPS = 64
"""The tokens that a pass looks at in one turn."""
LEAST_VOCABULARY = 1024
"""Below this, nothing is gained."""


def can_race(logits: Tensor, best: int = 1) -> bool:
    """Whether the kernel can run for these (..., V) logits and is worth while."""
    useful = best <= GROUPS and logits.shape[-1] >= LEAST_VOCABULARY and logits.numel() > 0
    return useful and logits.device.type == "cpu" and machine() is not None


class Left(NamedTuple):
    """What is left of each row, (R, n) each."""

    ids: Tensor
    """int64, ascending."""
    words: Tensor
    """int32, the `race_words` of the ids."""
    logits: Tensor
    """float32; −inf where an id only fills the row."""


def may_win(logits_RV: Tensor, z_R: Tensor, temperature_R: Tensor, best: int = 1) -> Left | None:
    """The tokens whose scores may be among the `best` largest of a row.

    Args:
        logits_RV: floating point, for which `can_race` is true.
        z_R: (R,) float64 noise.
        temperature_R: (R,) float64, above 0.
        best: 1 to `GROUPS`.
    Returns:
        None where a row has none, because its logits are not numbers.
    """
    R, V = logits_RV.shape
    logits_RV = logits_RV.float().contiguous()
    whole = V - V % GROUPS
    bounds_RV = torch.empty(torch.get_num_threads(), whole, dtype=torch.float32, device="cpu")
    ids_RV, words_RV = torch.empty(2, R, whole, dtype=torch.int32, device="cpu")
    kept_RV = torch.empty(R, whole, dtype=torch.float32, device="cpu")
    count_R = torch.empty(R, dtype=torch.int64, device="cpu")
    tensors = (logits_RV, z_R.contiguous(), temperature_R.contiguous(), bounds_RV, ids_RV, words_RV, kept_RV, count_R)
    _kernel(best > 1)(*(t.data_ptr() for t in tensors), R, V, whole, torch.get_num_threads())
    counts = count_R.tolist()
    if not all(counts):
        return None
    most = max(counts)
    ids_Rn, words_Rn, kept_Rn = ids_RV[:, :most].long(), words_RV[:, :most], kept_RV[:, :most]
    if min(counts) < most:
        fills_Rn = torch.arange(most) >= count_R[:, None]
        for left, filler in ((ids_Rn, 0), (words_Rn, 0), (kept_Rn, -torch.inf)):
            left.masked_fill_(fills_Rn, filler)
    if whole == V:
        return Left(ids_Rn, words_Rn, kept_Rn)
    rest = torch.arange(whole, V).expand(R, -1)  # the tokens behind the last whole group are kept
    parts = (ids_Rn, rest), (words_Rn, race_words(z_R, rest)), (kept_Rn, logits_RV[:, whole:])
    return Left(*(torch.cat(part, dim=1) for part in parts))


@cache
def _kernel(several: bool) -> Callable[..., None]:
    """The kernel for the winner, or for several best. A unit of work is a row."""
    n = lanes()
    f, i = f"<{n} x float>", f"<{n} x i32>"
    arguments = dict.fromkeys(("logits", "z", "temperature", "bounds", "ids", "words", "left", "count"), "ptr")
    arguments |= {"units": "i64", "V": "i64", "whole": "i64"}
    functions = [
        f"declare {f} @llvm.maxnum.v{n}f32({f}, {f})",
        f"declare float @llvm.vector.reduce.fmax.v{n}f32({f})",
        f"declare float @llvm.vector.reduce.fmin.v{n}f32({f})",
        "declare float @llvm.fabs.f32(float)",
        f"declare void @llvm.masked.compressstore.v{n}i32({i}, ptr, <{n} x i1>)",
        f"declare void @llvm.masked.compressstore.v{n}f32({f}, ptr, <{n} x i1>)",
        f"declare i{n} @llvm.ctpop.i{n}(i{n})",
    ]
    body = [*_row(), *_bounds(n), *_threshold(n, "fmin" if several else "fmax"), *_kept(n)]
    return compiled(body, arguments, functions)


def _row() -> list[str]:
    """The loop over rows begins: the row's logits, noise and inverse temperature, each in all lanes of a vector."""
    code = list(FIRST_ROW)
    code += ["%rV = mul i64 %r, %V", "%l = getelementptr float, ptr %logits, i64 %rV"]
    code += ["%tw = mul i64 %thread, %whole", "%u = getelementptr float, ptr %bounds, i64 %tw"]
    code.append("%ri = mul i64 %r, %whole")
    for name, kind in (("ids", "i32"), ("words", "i32"), ("left", "float")):
        code.append(f"%{name}.row = getelementptr {kind}, ptr %{name}, i64 %ri")
    code += [
        "%z.p = getelementptr double, ptr %z, i64 %r",
        "%z.1 = load double, ptr %z.p",
        f"%z.m = fmul double %z.1, {2.0**52}",
        "%z.bits = fptosi double %z.m to i64",  # as `race_key`
        "%low.1 = trunc i64 %z.bits to i32",
        "%z.high = lshr i64 %z.bits, 32",
        "%high.1 = trunc i64 %z.high to i32",
        "%t.p = getelementptr double, ptr %temperature, i64 %r",
        "%t.1 = load double, ptr %t.p",
        "%t.i = fdiv double 1.0, %t.1",
        "%inverse.1 = fptrunc double %t.i to float",
    ]
    for name, kind in (("low", "i32"), ("high", "i32"), ("inverse", "float")):
        code += everywhere(f"%{name}.1", f"%{name}.v", kind)
    return [*code, "br label %bound"]


def _bounds(n: int) -> list[str]:
    """The first pass: U of each token into memory, and the largest of each group where w ≤ 1/2."""
    f, i = f"<{n} x float>", f"<{n} x i32>"
    parts = range(GROUPS // n)
    code = ["bound:", "%v = phi i64 [0, %work], [%v.next, %bound]"]
    code += [f"%top{p} = phi {f} [{splat(-math.inf)}, %work], [%top{p}.next, %bound]" for p in parts]
    for p in parts:
        code += [f"%v{p} = add i64 %v, {p * n}", *_ids(f"%v{p}", f"%id{p}", n), *_words(f"%id{p}", f"%word{p}", n)]
        code += [
            f"%wf{p} = sitofp {i} %word{p} to {f}",
            f"%wm{p} = fmul {f} %wf{p}, {splat(2.0**-31)}",
            f"%w{p} = fadd {f} %wm{p}, {splat(2.0**-32)}",
            f"%bits{p} = bitcast {f} %w{p} to {i}",
            f"%bf{p} = sitofp {i} %bits{p} to {f}",
            f"%bl{p} = fmul {f} %bf{p}, {splat(0.6931471805599453 * 2.0**-23)}",
            f"%log{p} = fsub {f} %bl{p}, {splat(127 * 0.6931471805599453)}",
            f"%lp{p} = getelementptr float, ptr %l, i64 %v{p}",
            f"%lv{p} = load {f}, ptr %lp{p}, align 4",
            f"%lt{p} = fmul {f} %lv{p}, %inverse.v",
            f"%u{p} = fsub {f} %lt{p}, %log{p}",
            f"%up{p} = getelementptr float, ptr %u, i64 %v{p}",
            f"store {f} %u{p}, ptr %up{p}, align 4",
            f"%half{p} = fcmp ole {f} %w{p}, {splat(0.5)}",
            f"%um{p} = select <{n} x i1> %half{p}, {f} %u{p}, {f} {splat(-math.inf)}",
            f"%top{p}.next = call {f} @llvm.maxnum.v{n}f32({f} %top{p}, {f} %um{p})",
        ]
    return [
        *code,
        f"%v.next = add i64 %v, {GROUPS}",
        "%v.more = icmp ult i64 %v.next, %whole",
        "br i1 %v.more, label %bound, label %threshold",
    ]


def _threshold(n: int, reduction: str) -> list[str]:
    """best − 0.45, with room for the rounding of large numbers."""
    f, code = f"<{n} x float>", ["threshold:"]
    parts = range(GROUPS // n)
    code += [f"%b{p} = call float @llvm.vector.reduce.{reduction}.v{n}f32({f} %top{p}.next)" for p in parts]
    best = "%b0"
    for p in parts[1:]:
        code += [
            f"%c{p} = fcmp {'olt' if reduction == 'fmin' else 'ogt'} float %b{p}, {best}",
            f"%best{p} = select i1 %c{p}, float %b{p}, float {best}",
        ]
        best = f"%best{p}"
    return [
        *code,
        f"%size = call float @llvm.fabs.f32(float {best})",
        f"%room.r = fmul float %size, {float_constant(2.0**-18)}",
        f"%room = fadd float %room.r, {float_constant(0.45)}",
        f"%least = fsub float {best}, %room",
        *everywhere("%least", "%least.v"),
        "br label %keep",
    ]


def _kept(n: int) -> list[str]:
    """The second pass: ids, words and logits of the tokens that reach the threshold, and their number."""
    f = f"<{n} x float>"
    return [
        "keep:",
        "%k = phi i64 [0, %threshold], [%k.next, %keep.next]",
        "%n = phi i64 [0, %threshold], [%n.next, %keep.next]",
        "%kp = getelementptr float, ptr %u, i64 %k",
        f"%ku = load {f}, ptr %kp, align 4",
        f"%reach = fcmp oge {f} %ku, %least.v",
        f"%mask = bitcast <{n} x i1> %reach to i{n}",
        f"%some = icmp ne i{n} %mask, 0",
        "br i1 %some, label %keep.some, label %keep.next",
        "keep.some:",
        *_ids("%k", "%kid", n),
        *_words("%kid", "%kword", n),
        "%klp = getelementptr float, ptr %l, i64 %k",
        f"%kl = load {f}, ptr %klp, align 4",
        *_stored("ids", "%kid", "i32", n),
        *_stored("words", "%kword", "i32", n),
        *_stored("left", "%kl", "float", n),
        "br label %keep.next",
        "keep.next:",
        f"%ones = call i{n} @llvm.ctpop.i{n}(i{n} %mask)",
        f"%ones64 = zext i{n} %ones to i64",
        "%n.next = add i64 %n, %ones64",
        f"%k.next = add i64 %k, {n}",
        "%k.more = icmp ult i64 %k.next, %whole",
        "br i1 %k.more, label %keep, label %counted",
        "counted:",
        "%cp = getelementptr i64, ptr %count, i64 %r",
        "store i64 %n.next, ptr %cp",
        "br label %row.done",
        *next_row(),
    ]


def _stored(name: str, vector: str, kind: str, n: int) -> list[str]:
    """The lanes of a vector that reach the threshold go into the row of an array, behind those that are there."""
    suffix = f"v{n}{'i' if kind == 'i32' else 'f'}32"
    return [
        f"%{name}.p = getelementptr {kind}, ptr %{name}.row, i64 %n",
        f"call void @llvm.masked.compressstore.{suffix}(<{n} x {kind}> {vector}, ptr %{name}.p, <{n} x i1> %reach)",
    ]


def _ids(first: str, vector: str, n: int) -> list[str]:
    """A vector of the ids from an i64 on."""
    steps = ", ".join(f"i32 {lane}" for lane in range(n))
    code = [f"{vector}.first = trunc i64 {first} to i32", *everywhere(f"{vector}.first", f"{vector}.all", "i32")]
    return [*code, f"{vector} = add <{n} x i32> {vector}.all, <{steps}>"]


def _words(ids: str, vector: str, n: int) -> list[str]:
    """The `race_words` of a vector of ids."""
    i, name = f"<{n} x i32>", f"{vector}.x"
    code = [f"{name}m = mul {i} {ids}, {splat(RACE_STRIDE)}", f"{name}0 = add {i} {name}m, %low.v"]
    x = f"{name}0"
    for turn, (shift, multiplier) in enumerate(RACE_ROUNDS):
        y = f"{name}{turn + 1}"
        code += [f"{y}.s = lshr {i} {x}, {splat(shift)}", f"{y}.x = xor {i} {x}, {y}.s"]
        code.append(f"{y}{'.p' if turn == 0 else ''} = mul {i} {y}.x, {splat(multiplier)}")
        if turn == 0:
            code.append(f"{y} = add {i} {y}.p, %high.v")
        x = y
    return [
        *code,
        f"{name}.s = lshr {i} {x}, {splat(RACE_LAST_SHIFT)}",
        f"{name}.y = xor {i} {x}, {name}.s",
        f"{vector} = and {i} {name}.y, {splat(0x7FFFFFFF)}",
    ]
