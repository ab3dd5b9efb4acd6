"""Reading packed weights on a GPU: 16 bytes per thread at once, 512 adjacent bytes per warp.

The layouts are panels_32kJ of `runtime.artifact.layouts`; what the numbers of a group mean is in
`export.checkpoints.encodings.encoding`. Converting costs more than multiplying, so numbers are not always read as they
are stored: a `Reader` says how they are related to what it returns, and scales and offsets make up for it.

The dot product of weights a * read + b with x is a * (the sum of read * x) + b * (the sum of x).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

from build.kernels.cuda import float8_pairs
from build.kernels.cuda.binding import GPU, Binding
from build.kernels.cuda.placed_byte import placed_byte
from build.kernels.float8 import E4M3_UNIT
from build.kernels.parameters import UNUSED
from export.weights.format import MatrixLayout, Storage
from export.weights.table import format_of, vector_layout, vector_steps
from runtime.artifact.layouts import DOT, PANEL, WORD, WORD_ZERO

LAST_BYTE, ABOVE_INT8 = 0, 0x4B000000  # of a float32; the bits of 2**23, whose last byte counts ones
FLIPPED_SIGNS = 0x80808080  # which make int8 numbers unsigned, each larger by 128
FIRST_BYTE, ABOVE_INT4 = 2, 0x3F000000  # of a mantissa; the bits of 1, less those in that byte
IN_MANTISSA, NIBBLES, ONES = 3, 0x78787878, 0x80808080  # where four bits of each byte go there, and the bits of 1
BYTES = ("int8", "uint8")  # dtypes of int8 and of e4m3's bits

Part = tuple[tuple[int, ...], str]


def parts_of(layout: MatrixLayout) -> dict[str, Part]:
    """Shapes and dtypes of a kernel's parameters for scales, offsets and the order of the columns.

    Those that a layout lacks will be dropped; see `unused`.
    """
    given = {"s": layout.scales, "z": layout.offsets, "order": layout.order}
    return {name: part or (UNUSED, "int32" if name == "order" else "float32") for name, part in given.items()}


def part_buffer(layout: MatrixLayout, name: str) -> Any:
    """One of the parameters of `parts_of`."""
    return T.Buffer(*parts_of(layout)[name])


def unused(layout: MatrixLayout) -> list[str]:
    """Names of the parameters of `parts_of` that a layout does not use."""
    return [name for name, (size, _) in parts_of(layout).items() if size is UNUSED]


@dataclass(frozen=True)
class Loading:
    """The elements in which kernels load a packed matrix: its numbers, or words of several.

    Bytes are loaded as words, so that what several of them need is done once.
    """

    elements: int  # in 16 bytes
    dtype: str
    steps: int  # of K in one element

    @classmethod
    def of(cls, stored: Storage) -> "Loading":
        """Of a matrix that is stored in this way."""
        steps, dtype = vector_steps(stored), vector_layout(stored, PANEL, vector_steps(stored)).dtype
        each = WORD if format_of(stored).words else DOT if dtype in BYTES else 1
        return cls(steps // each, "uint32" if dtype in BYTES else dtype, each)

    def declared(self, w: Any) -> Any:
        """A packed matrix (panels, vectors, 32, numbers or words in 16 bytes) in these elements."""
        return T.decl_buffer((*w.shape[:-1], self.elements), self.dtype, data=w.data)


Read = Callable[[Any, Any, Any], Any]


@dataclass(frozen=True)
class Reader:
    """A way of reading step v of the vector at loaded[start :], as float32: the number is unit * read + first."""

    read: Read
    unit: int = 1
    first: int = 0


def _plain(loaded: Any, start: Any, v: Any) -> Any:
    return T.Cast("float32", loaded[start + v])


def _from_int8(loaded: Any, start: Any, v: Any) -> Any:
    """Byte v of some words."""
    at_top = loaded[start + v // DOT] << T.Cast("uint32", 24 - v % DOT * 8)
    return T.Cast("float32", T.reinterpret("int32", at_top) >> 24)


def _from_bits(loaded: Any, start: Any, v: Any) -> Any:
    """Step v of some words: byte j of a word holds step j in its lower half and step 4 + j in its upper half."""
    return T.Cast("float32", (loaded[start + v // WORD] >> (8 * (v % DOT) + 4 * (v % WORD // DOT))) & 15)


def _from_e4m3(loaded: Any, start: Any, v: Any) -> Any:
    """Byte v as the float16 with the same sign, exponent and mantissa; finite numbers only.

    The exponent of e4m3 has a bias of 7, that of float16 one of 15. Both even bytes of a word share their shifts, and
    so do both odd ones. sm_89 and later have an instruction that converts two at once; whether it is worth code of its
    own has not been measured.
    """
    at_top = loaded[start + v // DOT] << T.Cast("uint32", 8 - v % 2 * 8)
    both = float8_pairs.from_upper_bytes(at_top)
    return T.Cast("float32", T.reinterpret("float16", T.Cast("uint16", both >> T.Cast("uint32", v % DOT // 2 * 16))))


def _in_mantissa(on: Binding) -> Reader:
    """An int4 number q as 1 + q / 16, which is q's four bits at the front of the mantissa of 1.

    A shift and two masks move the four numbers in the same halves of a word's bytes to where they belong.
    """
    place = placed_byte(on)

    def read(loaded: Any, start: Any, v: Any) -> Any:
        word = T.reinterpret("uint32", loaded[start + v // WORD])
        moved = word >> T.Cast("uint32", v % WORD // DOT * 4) << T.uint32(IN_MANTISSA)
        ready = (moved & T.uint32(NIBBLES)) | T.uint32(ONES)
        return T.reinterpret("float32", place(ready, v % DOT, FIRST_BYTE, ABOVE_INT4))

    return Reader(read, 16, -16)


def _in_last_bits(on: Binding) -> Reader:
    """An int8 number q by way of 2**23 + 128 + q, whose last bits are q's, with the sign flipped; exact.

    The instruction that converts integers starts 16 times in a clock of a multiprocessor, too seldom for a matrix that
    is read at full speed. On an H200, one row from 4096 numbers to 28672 took 35.7 us by way of 2**23, where nvcc moved
    each byte to its place with shifts and masks, and 44.2 with that instruction; from 4096 to 32000, 41.3 and 40.8.
    """
    place = placed_byte(on)

    def read(loaded: Any, start: Any, v: Any) -> Any:
        unsigned = loaded[start + v // DOT] ^ T.uint32(FLIPPED_SIGNS)
        return T.reinterpret("float32", place(unsigned, v % DOT, LAST_BYTE, ABOVE_INT8)) - T.float32(2**23 + 128)

    return Reader(read)


PLAIN, FLOAT8 = Reader(_plain), Reader(_from_e4m3, E4M3_UNIT)
# By the format; others are read as they are.
NUMBERS = {"int4": Reader(_from_bits), "int8": Reader(_from_int8), "float8": FLOAT8}
FACTORS: dict[str, Callable[[Binding], Reader]] = {"int4": _in_mantissa, "int8": _in_last_bits}  # at the least cost


def number(stored: Storage) -> Reader:
    """The reader for `weight`: int4 as 0 to 15."""
    return NUMBERS.get(stored.dtype, PLAIN)


def factor(stored: Storage, on: Binding = GPU) -> Reader:
    """The reader for sums of products, with `group_scaling`; only how it reads depends on the binding."""
    return FACTORS[stored.dtype](on) if stored.dtype in FACTORS else number(stored)


def needs_sums(stored: Storage) -> bool:
    """Whether sums of products of what `factor` reads are corrected by sums of x."""
    return stored.grouped and (factor(stored).first != 0 or stored.offsets != "none")


def group_of(stored: Storage, vector: Any) -> Any:
    """The group that a vector belongs to; no group is shorter than a vector."""
    assert stored.group_size is not None
    return vector * vector_steps(stored) // stored.group_size


def row_scale(stored: Storage, s: Any, row: Any) -> Any:
    """The scale of an output, as float32, for what `number` or `factor` read."""
    unit = number(stored).unit
    return s[row] if unit == 1 else T.float32(unit) * s[row]


def weight(stored: Storage, read: Any, scale: Any, offset: Any) -> Any:
    """The weight that graphs compute with, from a number as `number` reads it and its group's scale and offset."""
    unit = number(stored).unit
    scale = T.Cast("float32", scale) if unit == 1 else T.float32(unit) * T.Cast("float32", scale)
    if stored.minimums:
        return read * scale + T.Cast("float32", offset)
    return (read - _zero_point(stored, offset)) * scale if _has_zero_point(stored) else read * scale


def group_scaling(stored: Storage, scale: Any, offset: Any) -> tuple[Any, Any]:
    """The numbers a and b that make weights, a * read + b in float32, of what `factor` reads.

    `scale` and `offset` are those of the group; b is zero unless `needs_sums`.
    """
    reader, scale = factor(stored), T.Cast("float32", scale)
    scaled = scale if reader.unit == 1 else T.float32(reader.unit) * scale
    if stored.minimums:
        minimum = T.Cast("float32", offset)
        return scaled, minimum + T.float32(reader.first) * scale if reader.first else minimum
    if not needs_sums(stored):
        return scaled, T.float32(0)
    return scaled, (T.float32(reader.first) - _zero_point(stored, offset)) * scale


def _has_zero_point(stored: Storage) -> bool:
    return stored.zero_points or format_of(stored).words


def _zero_point(stored: Storage, offset: Any) -> Any:
    """The number that stands for zero, as float32."""
    return T.Cast("float32", offset) if stored.zero_points else T.float32(WORD_ZERO)
