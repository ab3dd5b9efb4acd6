"""Pieces of a column, as the tensor cores' attention loads them: a few numbers as stored, in registers of 32 bits.

Between being loaded and being stored in shared memory, a piece takes `WORDS` registers, whatever the format; there it
becomes pairs of float16.
"""

from tvm.script import tirx as T

from build.kernels.cache_numbers import Cache
from build.kernels.cuda.mma import PAIR, pair
from build.kernels.shapes import RollingAttention

PIECE = 8  # numbers: 16 bytes as float16
WORDS = PIECE // PAIR  # uint32 in 16 bytes
STORED_WORDS = {"float16": WORDS, "int8": 2}  # uint32 in a piece as stored, by the dtype of the numbers


def supports(shape: RollingAttention) -> bool:
    """Whether pieces can be read from such a ring without losing more than float16 does."""
    return shape.cache_dtype in STORED_WORDS


def pieces_of(shape: RollingAttention, slots: int, cache: Cache) -> Cache:
    """The same memory with numbers as words: (B, n_kv_heads, slots, pieces, words of a piece)."""
    sizes = (shape.batch, shape.n_kv_heads, slots, shape.head_dim // PIECE, STORED_WORDS[shape.cache_dtype])
    return cache._replace(numbers=T.decl_buffer(sizes, "uint32", data=cache.numbers.data))


def piece_loader(shape: RollingAttention):
    """Inline `load(cache, b, h, slot, part, loaded, at)`: load a piece of a column into loaded[at : at + WORDS].

    A scale follows the numbers.
    """
    words, scaled = STORED_WORDS[shape.cache_dtype], shape.stored.scales is not None

    @T.inline
    def load(cache, b, h, slot, part, loaded, at):
        for v in T.vectorized(words):
            loaded[at + v] = cache.numbers[b, h, slot, part, v]
        if scaled:
            loaded[at + words] = T.reinterpret("uint32", cache.scales[b, h, slot, 0])

    return load


def pair_in_piece(shape: RollingAttention):
    """Function for pair v of a loaded piece, as two float16 in a uint32."""

    def as_stored(loaded, at, v, _part):
        return loaded[at + v]

    def from_int8(loaded, at, v, _part):
        scale = T.reinterpret("float32", loaded[at + STORED_WORDS["int8"]])

        def number(byte):
            """One of the four numbers in the word, sign-extended by shifts."""
            shifted = loaded[at + v // 2] << T.Cast("uint32", 24 - 8 * byte)
            return T.Cast("float32", T.reinterpret("int32", shifted) >> 24) * scale

        return pair(number(v % 2 * 2), number(v % 2 * 2 + 1))

    return {"float16": as_stored, "int8": from_int8}[shape.cache_dtype]
