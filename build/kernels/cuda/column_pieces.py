"""Pieces of a column, as the tensor cores' attention loads them: a few numbers as stored, in registers of 32 bits.

Between being loaded and being stored in shared memory, a piece takes `WORDS` registers, whatever the format; there it
becomes pairs of float16.
"""

from tvm.script import tirx as T

from build.kernels.cache_numbers import Cache, int4_number
from build.kernels.cuda import float8_pairs
from build.kernels.cuda.binding import Binding
from build.kernels.cuda.mma import PAIR, member, pair
from build.kernels.shapes import RollingAttention
from runtime.artifact.caches import FLOAT8, GROUP, HALF

PIECE = 8  # numbers: 16 bytes as float16
WORDS = PIECE // PAIR  # uint32 in 16 bytes
# By the dtype of the numbers: uint32 that hold a piece; those of int4 hold another piece as well.
STORED_WORDS = {"float16": WORDS, FLOAT8: 2, "int8": 2, "uint8": 2}


def supports(shape: RollingAttention) -> bool:
    """Whether pieces can be read from such a ring without losing more than float16 does."""
    return shape.cache_dtype in STORED_WORDS


def pieces_of(shape: RollingAttention, cache: Cache) -> Cache:
    """The same memory with numbers as words: (slots, n_kv_heads, ring_len, pieces or pairs of them, words)."""
    pieces = shape.head_dim // PIECE // (2 if shape.stored.group else 1)
    sizes = (shape.slots, shape.n_kv_heads, shape.ring_len, pieces, STORED_WORDS[shape.cache_dtype])
    return cache._replace(numbers=T.decl_buffer(sizes, "uint32", data=cache.numbers.data))


def piece_loader(shape: RollingAttention):
    """Inline `load(cache, slot, h, column, part, loaded, at)`: load a piece of a column into loaded[at : at + WORDS].

    The scale follows the numbers, of int4 with the minimum in one register.
    """
    words = STORED_WORDS[shape.cache_dtype]
    scaled, grouped = shape.stored.scales is not None, shape.stored.group is not None
    in_half = HALF // PIECE  # pieces whose numbers are in the same half of their bytes

    def bits(number):
        return T.Cast("uint32", T.reinterpret("uint16", number))

    @T.inline
    def load(cache, slot, h, column, part, loaded, at):
        if grouped:
            group = part // (GROUP // PIECE)
            for v in T.vectorized(words):
                loaded[at + v] = cache.numbers[slot, h, column, group * in_half + part % in_half, v]
            loaded[at + words] = bits(cache.scales[slot, h, column, group]) | (
                bits(cache.minima[slot, h, column, group]) << T.uint32(16)
            )
        else:
            for v in T.vectorized(words):
                loaded[at + v] = cache.numbers[slot, h, column, part, v]
            if scaled:
                loaded[at + words] = T.reinterpret("uint32", cache.scales[slot, h, column, 0])

    return load


def pair_in_piece(shape: RollingAttention, on: Binding):
    """Function for pair v of a loaded piece, as two float16 in a uint32."""

    widen_neighbours = float8_pairs.neighbours(on)

    def as_stored(loaded, at, v, _part):
        return loaded[at + v]

    def from_float8(loaded, at, v, _part):
        return widen_neighbours(loaded[at + v // 2] >> T.Cast("uint32", v % 2 * 16))

    def from_int8(loaded, at, v, _part):
        scale = T.reinterpret("float32", loaded[at + STORED_WORDS["int8"]])

        def number(byte):
            """One of the four numbers in the word, sign-extended by shifts."""
            shifted = loaded[at + v // 2] << T.Cast("uint32", 24 - 8 * byte)
            return T.Cast("float32", T.reinterpret("int32", shifted) >> 24) * scale

        return pair(number(v % 2 * 2), number(v % 2 * 2 + 1))

    def from_int4(loaded, at, v, part):
        scale, minimum = (member(loaded[at + STORED_WORDS["uint8"]], which) for which in (0, 1))

        def number(byte):
            shifted = loaded[at + v // 2] >> T.Cast("uint32", 8 * byte)
            return int4_number(shifted, part // (HALF // PIECE) % 2, scale, minimum)

        return pair(number(v % 2 * 2), number(v % 2 * 2 + 1))

    return {"float16": as_stored, FLOAT8: from_float8, "int8": from_int8, "uint8": from_int4}[shape.cache_dtype]
