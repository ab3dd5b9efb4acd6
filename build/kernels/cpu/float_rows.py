"""Products of floats, for any number of rows: a row of y has the same bits whichever rows are computed with it.

x is copied once per call into slabs of K, row by row, and normalised on the way. Threads share its rows, and then the
panels of outputs. For few tiles of rows, weights are used as they are read, which hides all other work behind their
reading. For more, a slab of a panel is widened to float32 once for all tiles. `blocks` says in which order K is added
up.
"""

from math import gcd

from tvm.script import tirx as T

from build.kernels.cpu.blocks import Blocks, block_product, blocks_of
from build.kernels.cpu.epilogue import panel_outputs
from build.kernels.cpu.level import Level, balanced_rows, fitting_lanes
from build.kernels.cpu.panels import arranged_row, padded_k, weight_groups
from build.kernels.cpu.row import prepared_row
from build.kernels.shapes import Linear
from runtime.artifact.layouts import PANEL


def float_rows(level: Level, shape: Linear):
    """Body of `linear` in float32."""
    rows = balanced_rows(shape.rows, level.tile.rows)
    tiles = -(-shape.rows // rows)
    panels = -(-shape.n_out // PANEL)
    blocks = blocks_of(shape)
    compute = panel_outputs(level, shape, tiles * rows, block_product(level, shape, blocks, rows, tiles))
    pack = _packed_row(level, shape, blocks)
    loop = T.parallel if shape.rows > 1 else T.serial

    @T.inline
    def body(x_rows, gain, order, w, s, z, residual, y):
        packed = T.alloc_buffer((blocks.slabs, tiles * rows, blocks.pitch), "float32")
        x_sums = T.alloc_buffer((tiles * rows, weight_groups(shape)), "float32")
        for i in loop(tiles * rows):
            pack(x_rows, gain, order, i, packed, x_sums)
        for p in T.parallel(panels):
            compute(p, residual, y, s, packed, x_sums, w, s, z)

    return body


def _packed_row(level: Level, shape: Linear, blocks: Blocks):
    """Inline `pack(x, gain, order, i, packed, x_sums)`: set packed[:, i] to row i of x, slab by slab.

    Rows past the last repeat it, and are not stored.
    """
    k, steps = shape.k, padded_k(shape.weight, shape.k)
    prepare, arrange = prepared_row(level, shape), arranged_row(level, shape)
    lanes = fitting_lanes(level, gcd(blocks.slab, steps))

    @T.inline
    def pack(x, gain, order, i, packed, x_sums):
        prepared = T.alloc_buffer((steps,), "float32")
        prepare(x, T.min(i, shape.rows - 1), gain, order, prepared)
        for c in T.serial(steps - k):
            prepared[k + c] = T.float32(0)
        arrange(prepared, x_sums, i)
        for slab in T.serial(blocks.slabs):
            for c in T.serial(T.min(blocks.slab, steps - slab * blocks.slab) // lanes):
                for v in T.vectorized(lanes):
                    packed[slab, i, c * lanes + v] = prepared[slab * blocks.slab + c * lanes + v]

    return pack
