"""Products of whole numbers: neighbours among a token's x share a scale, and sums within a group are int32.

x is rounded and packed once per call. As in `float_rows`, a row of y has the same bits whichever rows are computed with
it: sums of whole numbers are exact, whichever instruction makes them, and every product folds them into floats in the
same way.
"""

from tvm.script import tirx as T

from build.kernels.cpu.dot import Dot, WordDot
from build.kernels.cpu.epilogue import panel_outputs
from build.kernels.cpu.integer_blocks import above_value, block_count, needs_x_sums
from build.kernels.cpu.integer_dots import dot_product
from build.kernels.cpu.integer_row import PackedRows, packed_row, padded_steps
from build.kernels.cpu.integer_tiles import tile_product, tiles_of
from build.kernels.cpu.integer_words import WORD_ROWS, word_product
from build.kernels.cpu.level import Level, balanced_rows
from build.kernels.shapes import Linear
from export.weights.table import format_of
from runtime.artifact.layouts import DOT, PANEL


def integer_rows(level: Level, shape: Linear, dot: Dot, words: WordDot | None):
    """Body of `linear` in integers, for any number of rows.

    Many rows are multiplied in AMX's tiles, where the level has them; fewer by `words`, if there is such a product and
    the weights are int4, or by `dot`.
    """
    if level.amx_rows is not None and shape.rows >= level.amx_rows:
        tiles = tiles_of(shape)
        if tiles is not None:
            sums_too = needs_x_sums(shape.weight, 0, tiles.zero_points)
            return _body(level, shape, tiles.x, tile_product(level, shape, tiles), sums_too)
    direct = words if format_of(shape.weight).words else None
    planes = (direct or dot).planes
    rows = balanced_rows(shape.rows, max((WORD_ROWS if direct else level.tile.rows) // planes, 1))
    x = PackedRows(
        -(-shape.rows // rows), rows, padded_steps(shape.k, DOT), DOT, planes, "int8" if direct else dot.x_dtype
    )
    product = (
        word_product(level, shape, direct, rows, x.tiles) if direct else dot_product(level, shape, dot, rows, x.tiles)
    )
    above = above_value(shape.weight, 0 if direct else dot.offset)
    return _body(level, shape, x, product, needs_x_sums(shape.weight, above, shape.weight.zero_points))


def _body(level: Level, shape: Linear, packed: PackedRows, product, sums_too: bool):
    """Pack x, with the sums of its blocks if `sums_too`, then compute all panels."""
    together = shape.weight.rounded_together(shape.k)
    pack = packed_row(level, shape, packed, sums_too=sums_too)
    compute = panel_outputs(level, shape, packed.count, product)
    loop = T.parallel if shape.rows > 1 else T.serial

    @T.inline
    def body(x_rows, gain, order, w, s, z, residual, y):
        x = T.alloc_buffer((packed.size,), packed.dtype)
        x_scales = T.alloc_buffer((packed.count, shape.k // together), "float32")
        x_sums = T.alloc_buffer((packed.count, block_count(shape)), "int32")
        for i in loop(packed.count):
            pack(x_rows, gain, order, i, x, x_scales, x_sums)
        for p in T.parallel(-(-shape.n_out // PANEL)):
            compute(p, residual, y, s, x, x_scales, x_sums, w, s, z)

    return body
