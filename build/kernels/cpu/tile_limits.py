"""The peaks of AMX: tiles that stay in their registers are multiplied again and again."""

from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from build.kernels.cpu.amx import (
    MOST_TILES,
    TILE_BYTES,
    TILE_ROWS,
    clear_tile,
    configured,
    load_tile,
    release,
    store_tile,
)

X, WEIGHTS, SUMS = 0, 1, 2  # the first tile of each kind
TILE = TILE_ROWS * TILE_BYTES  # bytes
# A product takes longer than it keeps the unit busy; the next one need not wait, since its sums are in another tile.
PRODUCTS = MOST_TILES - SUMS
TILE_SUMS = TILE // 4  # sums of 32 bits in a tile: of 16 rows and 16 outputs


def multiply_again(multiply: Callable[..., Any], dtype: str, threads: int, steps: int) -> PrimFunc:
    """Kernel from operands (2 * 1024,) int8, a tile of x and one of weights, to out (threads * 256,) of `dtype`.

    Each thread adds their product to `PRODUCTS` tiles of sums, `steps` times; `multiply` is one of the instructions in
    `build.kernels.cpu.amx`.
    """
    configure = configured([(TILE_ROWS, TILE_BYTES)] * MOST_TILES)

    @T.prim_func
    def kernel(operands: T.Buffer((2 * TILE,), "int8"), out: T.Buffer((threads * TILE_SUMS,), dtype)):
        T.func_attr({"tirx.noalias": True})
        for thread in T.parallel(threads):
            configure()
            load_tile(X, operands, 0, TILE_BYTES)
            load_tile(WEIGHTS, operands, TILE, TILE_BYTES)
            for i in T.unroll(PRODUCTS):
                clear_tile(SUMS + i)
            for _ in T.serial(steps):
                for i in T.unroll(PRODUCTS):
                    multiply(SUMS + i, X, WEIGHTS)
            store_tile(SUMS, out, thread * TILE_SUMS, TILE_BYTES)
            release()

    return kernel
