"""Integer dot products: four products added to each sum at a time, in the form that suits each CPU level.

A `Dot` takes a vector of weights (four steps of K for each of `columns` adjacent outputs) and four numbers of x, and
adds their products to `lanes` int32 sums. AVX2 multiplies int16 and leaves two partial sums per output. VNNI, of
AVX-512 or of AVX, multiplies unsigned by signed bytes: its weights are kept 128 above their value, and 128 times the
sum of x is subtracted at the end. x of 16 bits is two planes of bytes there, 256 times the first plus the second, each
with sums of its own. On AVX2, products with int4 have an instruction of their own, of which a `WordDot` makes use.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
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
    add: Callable[[Expr, Expr, Any, Expr], Expr]  # from int32 sums, kept weights, x and x_at to the new sums
    # From a vector of int32, each four numbers from 0 to 15, to those numbers as kept.
    from_bytes: Callable[[Expr], Expr]
    planes: int = 1  # parts of a number of x; two are bytes: four higher ones, then four lower ones

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
    """One way to multiply int4, eight steps in a word, by bytes of x: sums of 16 bits that grow to 32 now and then."""

    lanes: int  # int32 sums in a register, one for each output; there are twice as many int16 sums
    planes: int  # as in `Dot`
    run: int  # words whose products a sum of 16 bits holds
    add: Callable[[Expr, Expr, Any, Expr], Expr]  # int16 sums, four steps of numbers from 0 to 15, x, x_at
    grow: Callable[[Expr, Expr], Expr]  # int32 sums and int16 sums, which are added to them


def _intrinsic(name: str, dtype: str, *arguments: Expr) -> Expr:
    return T.call_llvm_pure_intrin(T.llvm_lookup_intrinsic_id(name), *arguments, dtype=dtype)


def _four(x: Any, at: Expr, word: str, lanes: int, dtype: str) -> Expr:
    """x[at : at + 4], repeated, as a vector of `dtype`."""
    return T.reinterpret(dtype, T.broadcast(T.reinterpret(word, x[T.ramp(at, 1, DOT)]), lanes))


def _avx2_add(sums: Expr, weights: Expr, x: Any, at: Expr) -> Expr:
    return sums + _intrinsic("llvm.x86.avx2.pmadd.wd", "int32x8", weights, _four(x, at, "int64", 4, "int16x16"))


def _vnni_dot(lanes: int) -> Dot:
    """The dot of `vpdpbusd` in registers of `lanes` int32 numbers, in the encoding that the processor has."""
    name, vector = f"llvm.x86.avx512.vpdpbusd.{32 * lanes}", lanes * DOT

    def add(sums: Expr, weights: Expr, x: Any, at: Expr) -> Expr:
        return _intrinsic(name, f"int32x{lanes}", sums, weights, _four(x, at, "int32", lanes, f"int8x{vector}"))

    return Dot(
        lanes=lanes,
        columns=lanes,
        x_dtype="int8",
        slab_dtype="uint8",
        offset=128,
        widened=lambda weights, n: T.reinterpret(f"uint8x{n}", weights) ^ T.broadcast(T.uint8(128), n),
        add=add,
        from_bytes=lambda four: T.reinterpret(f"uint8x{vector}", four),
    )


def _avx2_add_bytes(sums: Expr, numbers: Expr, x: Any, at: Expr) -> Expr:
    """Two products for each int16 sum; those of eight calls stay within 8 * 2 * 15 * 128, which is below 2^15."""
    four = _four(x, at, "int32", 8, "int8x32")
    return sums + _intrinsic("llvm.x86.avx2.pmadd.ub.sw", "int16x16", T.reinterpret("uint8x32", numbers), four)


def _avx2_grow(sums: Expr, pairs: Expr) -> Expr:
    return sums + _intrinsic("llvm.x86.avx2.pmadd.wd", "int32x8", pairs, T.broadcast(T.int16(1), 16))


AVX2_DOT = Dot(
    8,
    4,
    "int16",
    "int16",
    0,
    lambda weights, n: T.Cast(f"int16x{n}", weights),
    _avx2_add,
    lambda four: T.Cast("int16x16", T.reinterpret("uint8x16", four)),
)
VNNI_DOT, AVX_VNNI_DOT = _vnni_dot(16), _vnni_dot(8)
VNNI_WIDE_DOT, AVX_VNNI_WIDE_DOT = replace(VNNI_DOT, planes=2), replace(AVX_VNNI_DOT, planes=2)
AVX2_WORDS = WordDot(lanes=8, planes=1, run=4, add=_avx2_add_bytes, grow=_avx2_grow)
AVX2_WIDE_WORDS = replace(AVX2_WORDS, planes=2)
