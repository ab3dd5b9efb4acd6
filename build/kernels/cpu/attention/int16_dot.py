"""Dot products of whole numbers of 16 bits: two products are added to each sum of 32 bits at a time.

`pmaddwd` does so on every x86 level. Levels with VNNI have it together with the addition, as `vpdpwssd`, which LLVM
makes of the two.
"""

from collections.abc import Callable, Mapping
from typing import Any

from tvm.ir import Expr
from tvm.script import tirx as T

PAIR = 2
# By the number of sums; what any other number of sums takes, and a processor without these, is spelled out.
INSTRUCTIONS: Mapping[int, str] = {8: "llvm.x86.avx2.pmadd.wd", 16: "llvm.x86.avx512.pmaddw.d.512"}
INSTRUCTION_FLAGS: Mapping[int, str] = {8: "avx2", 16: "avx512bw"}

AddPairs = Callable[[Expr, Expr, Any, Expr], Expr]


def int16_dot(flags: tuple[str, ...], lanes: int) -> AddPairs:
    """A function of int32 sums (lanes), int16 numbers (lanes, 2), an int16 buffer x and an index in it.

    It returns each sum plus its two numbers times x[index] and x[index + 1]. The numbers are from -128 to 127.
    """
    if INSTRUCTION_FLAGS.get(lanes) not in flags:
        return _spelled_out(lanes)
    instruction = T.llvm_lookup_intrinsic_id(INSTRUCTIONS[lanes])

    def add(sums: Expr, numbers: Expr, x: Any, at: Expr) -> Expr:
        pair = T.reinterpret("int32", x[T.ramp(at, 1, PAIR)])
        repeated = T.reinterpret(f"int16x{PAIR * lanes}", T.broadcast(pair, lanes))
        return sums + T.call_llvm_pure_intrin(instruction, numbers, repeated, dtype=f"int32x{lanes}")

    return add


def _spelled_out(lanes: int) -> AddPairs:
    def add(sums: Expr, numbers: Expr, x: Any, at: Expr) -> Expr:
        for i in range(PAIR):
            each = T.Shuffle([numbers], list(range(i, PAIR * lanes, PAIR)))
            sums = sums + T.Cast(f"int32x{lanes}", each) * T.broadcast(T.Cast("int32", x[at + i]), lanes)
        return sums

    return add
