"""The peak of AMX: tiles that stay in their registers are multiplied again and again."""

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from build.kernels.cpu.amx import (
    TILE_BYTES,
    TILE_ROWS,
    clear_tile,
    configured,
    load_tile,
    multiply_tiles,
    release,
    store_tile,
)
from runtime.artifact.layouts import DOT

X, WEIGHTS, SUMS, MOST_TILES = 0, 1, 2, 8  # the first tile of each kind, and how many there are
TILE = TILE_ROWS * TILE_BYTES  # bytes
# A product takes longer than it keeps the unit busy; the next one need not wait, since its sums are in another tile.
PRODUCTS = MOST_TILES - SUMS
OPERATIONS = 2 * TILE_ROWS * TILE_BYTES * TILE_BYTES // DOT  # of one product: 16 rows, 64 steps and 16 outputs
INT32S = TILE // 4  # in a tile of sums


def multiply_tiles_again(threads: int, steps: int) -> PrimFunc:
    """Kernel from operands (2 * 1024,) int8, a tile of x and one of weights, to out (threads * 256,) int32.

    Each thread adds their product to `PRODUCTS` tiles of sums, `steps` times.
    """
    configure = configured([(TILE_ROWS, TILE_BYTES)] * MOST_TILES)

    @T.prim_func
    def kernel(operands: T.Buffer((2 * TILE,), "int8"), out: T.Buffer((threads * INT32S,), "int32")):
        T.func_attr({"tirx.noalias": True})
        for thread in T.parallel(threads):
            configure()
            load_tile(X, operands, 0, TILE_BYTES)
            load_tile(WEIGHTS, operands, TILE, TILE_BYTES)
            for i in T.unroll(PRODUCTS):
                clear_tile(SUMS + i)
            for _ in T.serial(steps):
                for i in T.unroll(PRODUCTS):
                    multiply_tiles(SUMS + i, X, WEIGHTS)
            store_tile(SUMS, out, thread * INT32S, TILE_BYTES)
            release()

    return kernel
