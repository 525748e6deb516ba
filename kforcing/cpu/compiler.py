"""Text in LLVM's language → a function of this process, compiled for this machine by `llvmlite`, in torch's own threads."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

try:
    import llvmlite.binding as llvm
except ImportError:  # pragma: no cover
    llvm = None


class Machine(NamedTuple):
    """What the code is made for."""

    lanes: int
    """Numbers of 32 bits in a vector."""
    sums: int
    """Vectors of sums that fit into the registers beside what is added to them."""


@cache
def machine() -> Machine | None:
    """What this computer's code is made for; None without llvmlite (LLVM 20 or newer), or where torch
    has no threads of GNU's OpenMP."""
    if llvm is None or llvm.llvm_version_info[0] < 20 or not _find_openmp():
        return None
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = llvm.get_host_cpu_features()
    if llvm.get_process_triple().startswith("x86") and not features.get("fma"):
        return None
    return Machine(16, 24) if features.get("avx512f") else Machine(8, 10)


def _target() -> Any:
    """LLVM's description of this machine. Each engine owns its own."""
    target = llvm.Target.from_triple(llvm.get_process_triple())
    features = llvm.get_host_cpu_features().flatten()
    return target.create_target_machine(cpu=llvm.get_host_cpu_name(), features=features, opt=3)


def _find_openmp() -> bool:
    """Tell LLVM where the functions of the OpenMP library are that torch was linked with; whether there is one."""
    try:
        libraries = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        for name in ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads"):
            llvm.add_symbol(name, ctypes.cast(getattr(libraries, name), ctypes.c_void_p).value)
    except (OSError, AttributeError):
        return False
    return True


_engines: list[Any] = []  # compiled code lives as long as its engine


def compiled(
    body: list[str], arguments: dict[str, str], functions: list[str], units: tuple[str, ...] = ()
) -> Callable[..., None]:
    """A function of the arguments and a number of threads, in which each thread does its share of some work.

    Args:
        body: LLVM code of the work of a thread, from the label `work` on. It ends with a jump to the label `done`, knows
            the arguments, and does the units from `%first` to before `%last`, of which there is at least one.
        arguments: name → LLVM type, `ptr`, `i64`, `i32` or `float`.
        functions: declarations of the functions that the body calls.
        units: LLVM code that sets `%units`, the number of units of work, where it is no argument.
    """
    code = [_in_threads(arguments), *functions, _share(arguments, units), *body, "done:\nret void\n}"]
    module = llvm.parse_assembly("\n".join(code))
    module.verify()
    engine = llvm.create_mcjit_compiler(module, _target())
    engine.finalize_object()
    _engines.append(engine)
    types = {"ptr": ctypes.c_void_p, "i64": ctypes.c_int64, "i32": ctypes.c_int32, "float": ctypes.c_float}
    signature = [types[type_] for type_ in arguments.values()] + [ctypes.c_int32]
    return ctypes.CFUNCTYPE(None, *signature)(engine.get_function_address("run"))


def _in_threads(arguments: dict[str, str]) -> str:
    """`run`, which puts its arguments into memory and lets all threads run `share`."""
    code = [
        "declare void @GOMP_parallel(ptr, ptr, i32, i32)",
        "declare i32 @omp_get_thread_num()",
        "declare i32 @omp_get_num_threads()",
        f"define void @run({', '.join(f'{type_} %{name}' for name, type_ in arguments.items())}, i32 %threads) {{",
        f"%arguments = alloca [{len(arguments)} x i64]",
    ]
    for i, (name, type_) in enumerate(arguments.items()):
        code += [f"%at.{name} = getelementptr i64, ptr %arguments, i64 {i}", f"store {type_} %{name}, ptr %at.{name}"]
    return "\n".join(
        [*code, "call void @GOMP_parallel(ptr @share, ptr %arguments, i32 %threads, i32 0)", "ret void", "}"]
    )


def _share(arguments: dict[str, str], units: tuple[str, ...]) -> str:
    """The beginning of `share`: the arguments, and the first and the last unit of this thread."""
    code = [f'define void @share(ptr %arguments) "prefer-vector-width"="{32 * lanes()}" {{', "entry:"]
    for i, (name, type_) in enumerate(arguments.items()):
        code += [f"%at.{name} = getelementptr i64, ptr %arguments, i64 {i}", f"%{name} = load {type_}, ptr %at.{name}"]
    return "\n".join(
        [
            *code,
            *units,
            "%thread32 = call i32 @omp_get_thread_num()",
            "%threads32 = call i32 @omp_get_num_threads()",
            "%thread = zext i32 %thread32 to i64",
            "%threads = zext i32 %threads32 to i64",
            "%share.low = mul i64 %units, %thread",
            "%first = udiv i64 %share.low, %threads",
            "%thread.next = add i64 %thread, 1",
            "%share.high = mul i64 %units, %thread.next",
            "%last = udiv i64 %share.high, %threads",
            "%any = icmp ult i64 %first, %last",
            "br i1 %any, label %work, label %done",
        ]
    )


def lanes() -> int:
    """Numbers in a vector on this machine, where kernels can run."""
    found = machine()
    assert found is not None
    return found.lanes


def everywhere(scalar: str, vector: str, type_: str = "float") -> list[str]:
    """A vector with a scalar in all lanes."""
    kind = f"<{lanes()} x {type_}>"
    return [
        f"{vector}.one = insertelement {kind} poison, {type_} {scalar}, i64 0",
        f"{vector} = shufflevector {kind} {vector}.one, {kind} poison, <{lanes()} x i32> zeroinitializer",
    ]


def splat(value: float | int) -> str:
    """A constant vector: of float32 for a float, of i32 for an int."""
    return f"splat (i32 {value})" if isinstance(value, int) else f"splat (float {float_constant(value)})"


def next_row() -> list[str]:
    """The end of a loop over rows, which began at the label `work` with row `%r`."""
    more = ["%r.next = add i64 %r, 1", "%r.more = icmp ult i64 %r.next, %last"]
    return ["row.done:", *more, "br i1 %r.more, label %work, label %done"]


FIRST_ROW = ["work:", "%r = phi i64 [%first, %entry], [%r.next, %row.done]"]
"""Its beginning."""


def float_constant(value: float) -> str:
    """A float32 constant as LLVM writes it: the bits of the double of the same value."""
    rounded = torch.tensor(value, dtype=torch.float32).double()
    return f"0x{int(rounded.view(torch.int64)) & (2**64 - 1):016X}"
