"""Dot products of bfloat16: two steps of K, side by side in 32 bits, are multiplied and added to each float32 sum."""

from collections.abc import Callable
from dataclasses import dataclass

from tvm.ir import Expr
from tvm.script import tirx as T


@dataclass(frozen=True)
class PairDot:
    """One way to multiply pairs of bfloat16, which are kept as uint32: the lower half is the earlier step."""

    lanes: int  # float32 sums in a register
    ir: str  # LLVM IR that a kernel must import with `T.attr(0, "pragma_import_llvm", ir)`
    add: Callable[[Expr, Expr, Expr], Expr]  # sums, their weights, and one pair of x for all of them


# TVM replaces vectors of bfloat16 by float32, so that a call of the instruction has to come as IR.
_AVX512_IR = """
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)

define <16 x float> @avx512_pair_dot(<16 x float> %sums, <16 x i32> %weights, <16 x i32> %x) alwaysinline {
  %w = bitcast <16 x i32> %weights to <32 x bfloat>
  %v = bitcast <16 x i32> %x to <32 x bfloat>
  %result = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float> %sums, <32 x bfloat> %w, <32 x bfloat> %v)
  ret <16 x float> %result
}
"""


def _avx512_add(sums: Expr, weights: Expr, x: Expr) -> Expr:
    return T.call_pure_extern("float32x16", "avx512_pair_dot", sums, weights, T.broadcast(x, 16))


AVX512_PAIR_DOT = PairDot(lanes=16, ir=_AVX512_IR, add=_avx512_add)
