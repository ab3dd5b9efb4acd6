"""Products of bfloat16 with activations that are rounded to it, two steps of K at a time, for any number of rows.

x is packed once per call, row by row, as pairs of bfloat16; it is normalised and rounded on the way. Threads share the
panels of outputs. K is cut into runs, each is summed in order, and then all together, so that a row of y
has the same bits whichever rows are computed with it. Weights are used as they are read.
"""

from tvm.script import tirx as T

from build.kernels.cpu.epilogue import panel_outputs
from build.kernels.cpu.level import FEW_TILES, Level, balanced_rows, sums_beside_prefetches, tile_columns
from build.kernels.cpu.pair_dot import PairDot
from build.kernels.cpu.panels import as_read
from build.kernels.cpu.row import prepared_row
from build.kernels.cpu.vector import AHEAD, LINE, odd_lines, prefetch
from build.kernels.shapes import Linear
from runtime.artifact.layouts import PAIR, PANEL

WORDS_OF_LINE = LINE // 4
# Vectors of sums, to hide the latency of a dot product.
IN_FLIGHT = 8


def pair_rows(level: Level, shape: Linear, dot: PairDot):
    """Body of `linear` by dot products of pairs."""
    rows = balanced_rows(shape.rows, level.tile.rows)
    tiles = -(-shape.rows // rows)
    panels, width = -(-shape.n_out // PANEL), packed_width(shape.k)
    compute = panel_outputs(level, shape, tiles * rows, _pair_product(level, shape, dot, rows, tiles))
    pack = packed_pairs(level, shape)
    loop = T.parallel if shape.rows > 1 else T.serial

    @T.inline
    def body(x_rows, gain, order, w, s, z, residual, y):  # noqa: ARG001
        x = T.alloc_buffer((tiles * rows, width), "uint32")
        for i in loop(tiles * rows):
            pack(x_rows, gain, order, i, x)
        with T.attr(0, "pragma_import_llvm", dot.ir):
            for p in T.parallel(panels):
                compute(p, residual, y, s, x, w)

    return body


def packed_width(k: int) -> int:
    """Words of a row of packed x."""
    return odd_lines(-(-k // PAIR))


def packed_pairs(level: Level, shape: Linear):
    """Inline `pack(x, gain, order, i, packed)`: set packed[i, :] to row i of x as pairs of bfloat16, then zeros.

    Rows past the last repeat it, and are not stored.
    """
    k, width = shape.k, packed_width(shape.k)
    prepare = prepared_row(level, shape)
    lanes = level.lanes // 2  # of 64 bits

    @T.inline
    def pack(x, gain, order, i, packed):
        prepared = T.alloc_buffer((width * PAIR,), "float32")
        prepare(x, T.min(i, shape.rows - 1), gain, order, prepared)
        for c in T.serial(width * PAIR - k):
            prepared[k + c] = T.float32(0)
        both = T.decl_buffer((width,), "uint64", data=prepared.data)
        for c in T.serial(width // lanes):
            for v in T.vectorized(lanes):
                packed[i, c * lanes + v] = T.Cast(
                    "uint32", both[c * lanes + v] >> T.uint64(16) & T.uint64(0xFFFF)
                ) | T.Cast("uint32", both[c * lanes + v] >> T.uint64(32) & T.uint64(0xFFFF0000))

    return pack


def _pair_product(level: Level, shape: Linear, dot: PairDot, rows: int, tiles: int):
    """Inline `product(p, total, x, w)`: set total[: tiles * R * PANEL] to x times panel p.

    Sums past N are garbage, but cause no faults.
    """
    pairs, lanes, few = -(-shape.k // PAIR), dot.lanes, tiles <= FEW_TILES
    runs = next(n for n in (IN_FLIGHT // (PANEL // lanes), 2, 1) if pairs % n == 0)
    run = pairs // runs
    # Prefetches leave room for fewer sums, but only reading from memory needs them.
    room = max(sums_beside_prefetches(level) * lanes // (rows * PANEL), 1) if few else 1
    together = next(n for n in (4, 2, 1) if runs % n == 0 and n <= room)
    columns = tile_columns(level, rows * together) if few else PANEL
    add_runs = _added_runs(dot, rows, together, columns, run)

    @T.inline
    def product(p, total, x, w):
        weights = as_read(w)
        for m in T.serial(tiles):
            for c in T.unroll(PANEL // columns):
                for first in T.unroll(runs // together):
                    add_runs(p, total, x, weights, m, c, first * together, few and c == 0)

    return product


def _added_runs(dot: PairDot, rows: int, together: int, columns: int, run: int):
    """Inline `add_runs(p, total, x, w, m, c, first, fetches)`: add runs from `first` on to part c of tile m of total.

    The first run of all is what the others are added to.
    """
    lanes, parts = dot.lanes, columns // dot.lanes
    vectors = rows * parts

    @T.inline
    def add_runs(p, total, x, w, m, c, first, fetches):
        kept = T.alloc_buffer((together * vectors * lanes,), "float32")
        for i in T.unroll(together * vectors):
            kept[T.ramp(i * lanes, 1, lanes)] = T.broadcast(T.float32(0), lanes)
        for d in T.serial(run):
            for t in T.unroll(together):
                if fetches:
                    for line in T.unroll(PANEL // WORDS_OF_LINE):
                        prefetch(w, p, (first + t) * run + d + AHEAD // (PANEL * 4), line * WORDS_OF_LINE)
                for r in T.unroll(rows):
                    for i in T.unroll(parts):
                        kept[T.ramp((t * vectors + r * parts + i) * lanes, 1, lanes)] = dot.add(
                            kept[T.ramp((t * vectors + r * parts + i) * lanes, 1, lanes)],
                            w[p, (first + t) * run + d, T.ramp(c * columns + i * lanes, 1, lanes)],
                            x[m * rows + r, (first + t) * run + d],
                        )
        for t in T.unroll(together):
            for r in T.unroll(rows):
                for i in T.unroll(parts):
                    at = (m * rows + r) * PANEL + c * columns + i * lanes
                    if first + t == 0:
                        total[T.ramp(at, 1, lanes)] = kept[T.ramp((r * parts + i) * lanes, 1, lanes)]
                    else:
                        total[T.ramp(at, 1, lanes)] = (
                            total[T.ramp(at, 1, lanes)] + kept[T.ramp((t * vectors + r * parts + i) * lanes, 1, lanes)]
                        )

    return add_runs
