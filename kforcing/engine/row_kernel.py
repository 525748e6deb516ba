"""Products of a few rows with a weight matrix, at the speed at which memory delivers the matrix.

A decoding step multiplies a few rows by every matrix of the model, so it takes at least the time of reading the weights once.
The libraries behind torch reach that time for one row only; 4 rows take them 1.4 to 1.7 times as long. This kernel

* reads a block of rows of the matrix once for all rows of the input, and keeps all sums of the block in registers,
* asks the processor for the next block while it works on this one (prefetch instructions),
* adds up each output in an order that does not depend on the number of rows: a row gets bit by bit the same result alone
  and among others.

The kernel is a text in LLVM's intermediate language, which `llvmlite` compiles for the machine when a number of rows is first
used (about 15 ms). It runs in the threads of torch's own OpenMP. Without llvmlite or OpenMP, torch's products are used.

Shapes: N rows, K inputs, M outputs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

try:
    import llvmlite.binding as llvm
except ImportError:  # pragma: no cover
    llvm = None


class Machine(NamedTuple):
    """What the code is made for."""

    target: Any
    lanes: int
    """Numbers in a vector."""
    sums: int
    """Vectors of sums that fit into the registers."""
    most_rows: int
    """Rows up to which the kernel is faster than torch."""


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


@cache
def machine() -> Machine | None:
    """What this computer's code is made for; None where the kernel cannot run."""
    if llvm is None or _openmp() is None:
        return None
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = llvm.get_host_cpu_features()
    target = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=features.flatten(), opt=3
    )
    wide = bool(features.get("avx512f"))
    lanes, sums, most_rows = (16, 24, 20) if wide else (8, 10, 8)
    return Machine(target, lanes, sums, most_rows)


@cache
def _openmp() -> Any:
    """The library whose threads torch uses, or None where it has another kind of threads."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        openmp = ctypes.CDLL(str(library))  # finds names in the libraries that torch itself was linked with
        for name in ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads"):
            llvm.add_symbol(name, ctypes.cast(getattr(openmp, name), ctypes.c_void_p).value)
    except (OSError, AttributeError):
        return None
    return openmp


def can_multiply(weight_MK: Tensor) -> bool:
    """Whether the kernel takes this matrix: contiguous, on a CPU, in a known dtype, K a multiple of a cache line."""
    if weight_MK.device.type != "cpu" or weight_MK.dtype not in WEIGHTS or not weight_MK.is_contiguous():
        return False
    found = machine()
    if found is None:
        return False
    return len(weight_MK) >= 8 and weight_MK.shape[1] % _inputs_at_once(found, weight_MK.dtype) == 0


def multiply(x_NK: Tensor, weight_MK: Tensor, out_NM: Tensor, scale_M: Tensor | None = None) -> None:
    """x · weightᵀ into `out_NM`, whose rows may be parts of longer ones. At most `machine().most_rows` rows.

    Args:
        x_NK: float32, contiguous.
        weight_MK: a matrix that `can_multiply` accepts.
        out_NM: float32, its last dimension contiguous.
        scale_M: float32; output m is multiplied by scale_M[m]. Needed for int8 weights, not allowed for others.
    """
    product = _compiled(len(x_NK), weight_MK.dtype)
    product(
        x_NK.data_ptr(),
        weight_MK.data_ptr(),
        0 if scale_M is None else scale_M.data_ptr(),
        out_NM.data_ptr(),
        weight_MK.shape[0],
        weight_MK.shape[1],
        out_NM.stride(0),
        torch.get_num_threads(),
    )


_engines: list[Any] = []  # compiled code lives as long as its engine


@cache
def _compiled(rows: int, dtype: torch.dtype) -> Callable[..., None]:
    found = machine()
    assert found is not None
    module = llvm.parse_assembly(assembly(rows, dtype, found))
    module.verify()
    engine = llvm.create_mcjit_compiler(module, found.target)
    engine.finalize_object()
    _engines.append(engine)
    arguments = [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 3 + [ctypes.c_int32]
    return ctypes.CFUNCTYPE(None, *arguments)(engine.get_function_address("product"))


def _inputs_at_once(found: Machine, dtype: torch.dtype) -> int:
    return max(found.lanes, CACHE_LINE // WEIGHTS[dtype].size)


ARGUMENTS = {"x": "ptr", "w": "ptr", "scale": "ptr", "y": "ptr", "M": "i64", "K": "i64", "stride": "i64"}
"""Of `product` and, through memory, of `share`. `stride` is the distance between rows of y."""


class Shape(NamedTuple):
    """The constants of a kernel."""

    N: int
    """Rows of x."""
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


def assembly(rows: int, dtype: torch.dtype, found: Machine) -> str:
    """The kernel for a number of rows, in LLVM's language.

    `product` puts its arguments into memory and lets all threads run `share`. Each thread takes an equal share of the blocks
    of B rows of the matrix. The last block begins early enough to be whole; what it computes again has the same values.
    """
    block = max(1, min(8, found.sums // rows))
    shape = Shape(rows, block, found.lanes, _inputs_at_once(found, dtype), WEIGHTS[dtype])
    return "\n".join([*_product(shape), *_share_of_a_thread(shape), *_block(shape), *_inputs(shape), *_store(shape)])


def _product(shape: Shape) -> list[str]:
    vector, n = shape.vector, shape.lanes
    code = [
        "declare void @GOMP_parallel(ptr, ptr, i32, i32)",
        "declare i32 @omp_get_thread_num()",
        "declare i32 @omp_get_num_threads()",
        "declare void @llvm.prefetch.p0(ptr, i32, i32, i32)",
        f"declare {vector} @llvm.fma.v{n}f32({vector}, {vector}, {vector})",
        f"declare float @llvm.vector.reduce.fadd.v{n}f32(float, {vector})",
        f"define void @product({', '.join(f'{type_} %{name}' for name, type_ in ARGUMENTS.items())}, i32 %threads) {{",
        f"%a = alloca [{len(ARGUMENTS)} x i64]",
    ]
    for i, (name, type_) in enumerate(ARGUMENTS.items()):
        code += [f"%p{name} = getelementptr i64, ptr %a, i64 {i}", f"store {type_} %{name}, ptr %p{name}"]
    return [*code, "call void @GOMP_parallel(ptr @share, ptr %a, i32 %threads, i32 0)", "ret void", "}"]


def _share_of_a_thread(shape: Shape) -> list[str]:
    """The arguments, and the first and the last block of this thread."""
    code = [f'define void @share(ptr %a) "prefer-vector-width"="{32 * shape.lanes}" {{', "entry:"]
    for i, (name, type_) in enumerate(ARGUMENTS.items()):
        code += [f"%p{name} = getelementptr i64, ptr %a, i64 {i}", f"%{name} = load {type_}, ptr %p{name}"]
    return [
        *code,
        "%thread32 = call i32 @omp_get_thread_num()",
        "%threads32 = call i32 @omp_get_num_threads()",
        "%thread = zext i32 %thread32 to i64",
        "%threads = zext i32 %threads32 to i64",
        f"%M.up = add i64 %M, {shape.B - 1}",
        f"%blocks = udiv i64 %M.up, {shape.B}",
        "%low = mul i64 %blocks, %thread",
        "%first = udiv i64 %low, %threads",
        "%thread.next = add i64 %thread, 1",
        "%high = mul i64 %blocks, %thread.next",
        "%last = udiv i64 %high, %threads",
        f"%m.most = sub i64 %M, {shape.B}",
        f"%ahead = mul i64 %K, {shape.B * shape.weight.size}",
        "%any = icmp ult i64 %first, %last",
        "br i1 %any, label %block, label %done",
    ]


def _block(shape: Shape) -> list[str]:
    """The loop over blocks begins: pointers to the rows of the weights (w) and of the input (x)."""
    code = [
        "block:",
        "%b = phi i64 [%first, %entry], [%b.next, %store]",
        f"%m.b = mul i64 %b, {shape.B}",
        "%over = icmp ugt i64 %m.b, %m.most",
        "%m = select i1 %over, i64 %m.most, i64 %m.b",
    ]
    for j in range(shape.B):
        code += [f"%m{j} = add i64 %m, {j}", f"%mK{j} = mul i64 %m{j}, %K"]
        code += [f"%mKs{j} = mul i64 %mK{j}, {shape.weight.size}", f"%w{j} = getelementptr i8, ptr %w, i64 %mKs{j}"]
    for i in range(shape.N):
        code += [f"%iK{i} = mul i64 %K, {i}", f"%x{i} = getelementptr float, ptr %x, i64 %iK{i}"]
    return [*code, "br label %inputs"]


def _inputs(shape: Shape) -> list[str]:
    """The loop over inputs: all sums of the block, from one cache line of each of its rows a turn."""
    vector, places = shape.vector, [(i, j) for i in range(shape.N) for j in range(shape.B)]
    code = ["inputs:", "%k = phi i64 [0, %block], [%k.next, %inputs]"]
    for i, j in places:
        after = f"%sum{i}.{j}.{shape.last_part}"
        code.append(f"%sum{i}.{j}.before = phi {vector} [zeroinitializer, %block], [{after}, %inputs]")
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
    """The outputs of the block, scaled where the weights have scales, and the end of the loop over blocks."""
    code, scaled = ["store:"], shape.weight is WEIGHTS[torch.int8]
    for j in range(shape.B) if scaled else ():
        code += [f"%sp{j} = getelementptr float, ptr %scale, i64 %m{j}", f"%sv{j} = load float, ptr %sp{j}"]
    reduce = f"call reassoc float @llvm.vector.reduce.fadd.v{shape.lanes}f32"
    for i in range(shape.N):
        code += [f"%row{i} = mul i64 %stride, {i}", f"%y{i} = getelementptr float, ptr %y, i64 %row{i}"]
        for j in range(shape.B):
            total = f"%total{i}.{j}"
            code.append(f"{total} = {reduce}(float 0.0, {shape.vector} %sum{i}.{j}.{shape.last_part})")
            if scaled:
                code.append(f"{total}.s = fmul float {total}, %sv{j}")
                total += ".s"
            code += [f"%yp{i}.{j} = getelementptr float, ptr %y{i}, i64 %m{j}", f"store float {total}, ptr %yp{i}.{j}"]
    return [
        *code,
        "%b.next = add i64 %b, 1",
        "%again = icmp ult i64 %b.next, %last",
        "br i1 %again, label %block, label %done",
        "done:",
        "ret void",
        "}",
    ]
