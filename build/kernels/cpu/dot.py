"""Integer dot products: four int8 products added to each sum at a time, in the form that suits each CPU level.

A `Dot` takes a vector of weights (four steps of K for each of `columns` adjacent outputs) and four numbers of x, and
adds their products to `lanes` int32 sums. AVX2 multiplies int16 and leaves two partial sums per output. AVX-512 VNNI
multiplies unsigned by signed bytes: its weights are kept 128 above their value, and 128 times the sum of x is
subtracted at the end. A `WordDot` takes int4 weights as stored, eight steps in an int32, as numbers from 0 to 15, and
x as int8.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.ir import Expr
from tvm.script import tirx as T

from runtime.artifact.layouts import DOT

NIBBLES = 0x0F0F0F0F


@dataclass(frozen=True)
class Dot:
    """One way to multiply int8 by int8."""

    lanes: int  # int32 sums in a register
    columns: int  # outputs that these sums belong to
    x_dtype: str
    slab_dtype: str  # dtype of weights between unpacking and use
    offset: int  # how far a kept weight is above its value
    widened: Callable[[Expr, int], Expr]  # from an int8 vector and its length to the kept form
    add: Callable[..., Any]  # inline (sums, at, kept weights, x, x_at): sums[at : at + lanes] += products

    @property
    def partials(self) -> int:
        """Partial sums per output, which are adjacent."""
        return self.lanes // self.columns

    @property
    def vector(self) -> int:
        """Weights that one dot product takes."""
        return self.columns * DOT


@dataclass(frozen=True)
class WordDot:
    """One way to multiply int4, eight steps in a word, by int8."""

    lanes: int  # int32 sums in a register, one for each output
    add: Callable[..., Any]  # inline (sums, at, words, x, x_at)


def _intrinsic(name: str, dtype: str, *arguments: Expr) -> Expr:
    return T.call_llvm_pure_intrin(T.llvm_lookup_intrinsic_id(name), *arguments, dtype=dtype)


def _four(x: Any, at: Expr, word: str, lanes: int, dtype: str) -> Expr:
    """x[at : at + 4], repeated, as a vector of `dtype`."""
    return T.reinterpret(dtype, T.broadcast(T.reinterpret(word, x[T.ramp(at, 1, DOT)]), lanes))


def _avx2_add(sums: Expr, weights: Expr, x: Any, at: Expr) -> Expr:
    return sums + _intrinsic("llvm.x86.avx2.pmadd.wd", "int32x8", weights, _four(x, at, "int64", 4, "int16x16"))


def _vnni_add(sums: Expr, weights: Expr, x: Any, at: Expr) -> Expr:
    return _intrinsic("llvm.x86.avx512.vpdpbusd.512", "int32x16", sums, weights, _four(x, at, "int32", 16, "int8x64"))


def _avx2_add_words(sums: Expr, words: Expr, x: Any, at: Expr) -> Expr:
    """Add int4 products; two pairs of products together stay within 2 * 2 * 15 * 127, which fits int16."""

    def pairs(numbers: Expr, at: Expr) -> Expr:
        return _intrinsic(
            "llvm.x86.avx2.pmadd.ub.sw",
            "int16x16",
            T.reinterpret("uint8x32", numbers),
            _four(x, at, "int32", 8, "int8x32"),
        )

    mask = T.broadcast(T.int32(NIBBLES), 8)
    both = pairs(words & mask, at) + pairs((words >> T.broadcast(T.int32(4), 8)) & mask, at + DOT)
    return sums + _intrinsic("llvm.x86.avx2.pmadd.wd", "int32x8", both, T.broadcast(T.int16(1), 16))


def _vnni_add_words(sums: Expr, words: Expr, x: Any, at: Expr) -> Expr:
    mask = T.broadcast(T.int32(NIBBLES), 16)
    low = _vnni_add(sums, T.reinterpret("uint8x64", words & mask), x, at)
    return _vnni_add(low, T.reinterpret("uint8x64", (words >> T.broadcast(T.int32(4), 16)) & mask), x, at + DOT)


AVX2_DOT = Dot(8, 4, "int16", "int16", 0, lambda weights, n: T.Cast(f"int16x{n}", weights), _avx2_add)
VNNI_DOT = Dot(
    16,
    16,
    "int8",
    "uint8",
    128,
    lambda weights, n: T.reinterpret(f"uint8x{n}", weights) ^ T.broadcast(T.uint8(128), n),
    _vnni_add,
)
AVX2_WORDS = WordDot(8, _avx2_add_words)
VNNI_WORDS = WordDot(16, _vnni_add_words)
