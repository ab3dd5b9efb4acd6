"""Products of floats, for any number of rows: a row of y has the same bits whichever rows are computed with it.

x is packed once per call into tiles (tiles, K, R), so that the inner loop reads both operands in order; it is
normalised on the way. Threads share the panels of outputs. For few tiles, weights are used as they are read, which
hides all other work behind their reading. For more, a piece of a panel is widened to float32 once for all tiles.

The order in which K is added up is a matter of the format alone: `runs` for numbers of two bytes or more, `sections`
for narrower ones.
"""

from tvm.script import tirx as T

from build.kernels.cpu.epilogue import panel_outputs
from build.kernels.cpu.level import FEW_TILES, Level, balanced_rows
from build.kernels.cpu.panels import ITEMSIZE, arranged_row, padded_k, weight_groups
from build.kernels.cpu.row import prepared_row
from build.kernels.cpu.runs import run_product
from build.kernels.cpu.sections import Sections, section_product, sections_of
from build.kernels.shapes import Linear
from export.weights.table import format_of, panel_layout
from runtime.artifact.layouts import PANEL


def float_rows(level: Level, shape: Linear):
    """Body of `linear` in float32."""
    rows = balanced_rows(shape.rows, level.tile.rows)
    tiles = -(-shape.rows // rows)
    panels = -(-shape.n_out // PANEL)
    if _in_runs(shape):
        order, product = _in_order(shape), run_product(level, shape, rows, tiles)
    else:
        sections = sections_of(shape)
        order = sections if tiles > FEW_TILES else _in_order(shape)
        product = section_product(level, shape, sections, rows, tiles)
    steps = order.size * -(-shape.k // order.size)
    compute, pack = panel_outputs(level, shape, tiles * rows, product), _packed_row(level, shape, rows, order)

    @T.inline
    def body(x_rows, gain, columns, w, s, z, residual, y):
        packed = T.alloc_buffer((tiles, steps, rows), "float32")
        x_sums = T.alloc_buffer((tiles * rows, weight_groups(shape)), "float32")
        if shape.rows == 1:
            pack(x_rows, gain, columns, 0, packed, x_sums)
        else:
            for i in T.parallel(tiles * rows):
                pack(x_rows, gain, columns, i, packed, x_sums)
        for p in T.parallel(panels):
            compute(p, residual, y, s, packed, x_sums, w, s, z)

    return body


def _in_runs(shape: Linear) -> bool:
    itemsize = ITEMSIZE[panel_layout(shape.weight, shape.n, shape.k).dtype]
    return itemsize > 1 and not format_of(shape.weight).words


def _in_order(shape: Linear) -> Sections:
    """K as it is kept."""
    return Sections(size=padded_k(shape.weight, shape.k), count=1, width=1)


def _packed_row(level: Level, shape: Linear, rows: int, order: Sections):
    """Inline `pack(x, gain, columns, i, packed, x_sums)`: set packed[i // R, :, i % R] to row i of x.

    The strands of each section follow one another. Rows past the last repeat it, and are not stored.
    """
    k = shape.k
    sections, turns = -(-k // order.size), order.size // order.turn
    prepare, arrange = prepared_row(level, shape), arranged_row(level, shape)

    @T.inline
    def pack(x, gain, columns, i, packed, x_sums):
        prepared = T.alloc_buffer((sections * order.size,), "float32")
        prepare(x, T.min(i, shape.rows - 1), gain, columns, prepared)
        for c in T.serial(sections * order.size - k):
            prepared[k + c] = T.float32(0)
        arrange(prepared, x_sums, i)
        for section in T.serial(sections):
            for n in T.serial(turns):
                for o in T.unroll(order.turn):
                    packed[i // rows, section * order.size + order.place(n, o), i % rows] = prepared[
                        section * order.size + n * order.turn + o
                    ]

    return pack
