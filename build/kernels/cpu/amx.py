"""AMX, the matrix unit of newer Intel processors: its registers, which are tiles of bytes, and its instructions.

A tile has up to 16 rows of up to 64 bytes. A product of whole numbers adds, to a tile of int32 sums (rows of x, 16
outputs), a tile of x (rows of x, steps of K) times one of weights (steps of K / 4, 16 outputs, 4). The semantics are in
Intel's "Instruction Set Reference" (TDPBSSD, LDTILECFG). A thread describes its tiles before it uses them and releases
them afterwards, since tiles in use slow down a change of threads. A process must have asked Linux for leave:
`runtime.engines.amx`.
"""

import struct
from collections.abc import Sequence

from tvm.ir import Expr
from tvm.script import tirx as T

TILE_ROWS, TILE_BYTES = 16, 64
MOST_TILES = 8
CONFIGURATION = (
    64  # bytes, of which the first names the kind of palette; then, tile by tile, two for bytes, one for rows
)
PALETTE, ROW_BYTES_AT, ROWS_AT = 1, 16, 48


def _instruction(name: str, *operands: Expr) -> Expr:
    return T.call_llvm_intrin(T.llvm_lookup_intrinsic_id(f"llvm.x86.{name}"), *operands, dtype="void")


def configured(shapes: Sequence[tuple[int, int]]):
    """Inline `configure()`: describe tiles 0, 1, ... by their rows and their bytes in a row."""
    configuration = bytearray(CONFIGURATION)
    configuration[0] = PALETTE
    for tile, (rows, row_bytes) in enumerate(shapes):
        configuration[ROWS_AT + tile] = rows
        configuration[ROW_BYTES_AT + 2 * tile] = row_bytes
    words = struct.unpack(f"<{CONFIGURATION // 8}q", configuration)

    def word(i: Expr) -> Expr:
        value = T.int64(words[0])
        for n in range(1, len(words)):
            value = T.if_then_else(i == n, T.int64(words[n]), value)
        return value

    @T.inline
    def configure():
        held = T.alloc_buffer((len(words),), "int64")
        for i in T.unroll(len(words)):
            held[i] = word(i)
        T.evaluate(_instruction("ldtilecfg", T.address_of(held[0])))

    return configure


@T.inline
def release():
    """Let go of all tiles."""
    T.evaluate(_instruction("tilerelease"))


@T.inline
def clear_tile(tile):
    """Set a tile to zero."""
    T.evaluate(_instruction("tilezero", T.Cast("int8", tile)))


@T.inline
def load_tile(tile, buffer, at, row_bytes):
    """Load a tile from buffer[at :], whose rows are `row_bytes` bytes apart."""
    T.evaluate(_instruction("tileloadd64", T.Cast("int8", tile), T.address_of(buffer[at]), T.int64(row_bytes)))


@T.inline
def store_tile(tile, buffer, at, row_bytes):
    """Store a tile to buffer[at :]."""
    T.evaluate(_instruction("tilestored64", T.Cast("int8", tile), T.address_of(buffer[at]), T.int64(row_bytes)))


@T.inline
def multiply_tiles(sums, x, weights):
    """sums += x times weights, all of them signed."""
    T.evaluate(_instruction("tdpbssd", T.Cast("int8", sums), T.Cast("int8", x), T.Cast("int8", weights)))


@T.inline
def multiply_bfloat16_tiles(sums, x, weights):
    """sums += x times weights, of pairs of bfloat16 and float32 sums."""
    T.evaluate(_instruction("tdpbf16ps", T.Cast("int8", sums), T.Cast("int8", x), T.Cast("int8", weights)))
