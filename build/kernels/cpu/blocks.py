"""Panels of numbers times x, in float32: K is cut into blocks, each is summed in order, and then all together.

A block is a group of numbers that share a scale or, without groups, up to BLOCK steps. Its sums never leave their
registers until they are added, scaled, to the output. One row takes several blocks at once, which hides the latency of
a multiply-add and keeps more cache lines in flight from memory. Several rows have too many sums for that and take fewer
blocks at a time, down to one, but add them in the same order, so that a row's sums stay the same.
"""

from dataclasses import dataclass

from tvm.ir import Expr
from tvm.script import tirx as T

from build.kernels.cpu.level import FEW_TILES, Level, sums_beside_prefetches, tile_columns
from build.kernels.cpu.panels import as_read, fetched_unit, group_total, kept_number, padded_k, unit_of
from build.kernels.cpu.vector import add_outer_product, clear, clear_memory, odd_lines
from build.kernels.shapes import Linear
from export.weights.table import format_of
from runtime.artifact.layouts import PANEL

# Steps of a block at most, where there are no groups, and of a slab, unless a block has more: a slab takes up to 32 kB,
# which is what the L1 cache of many processors holds.
BLOCK = 256
STREAMS = 2  # of one row; with four, the widened formats read up to a tenth less


@dataclass(frozen=True)
class Blocks:
    """A way to cut K into `count` blocks of `size` steps (the last may be shorter), and the order to add them in.

    `streams` are equal runs of adjacent blocks. The first block of each is added first, then the second of each. A slab
    is `held` adjacent blocks, whose weights are widened together; x lies in slabs too, (slabs, rows, pitch).
    """

    size: int
    count: int
    streams: int
    held: int  # one if there are several streams

    @property
    def slab(self) -> int:
        """Steps of a slab."""
        return self.size * self.held

    @property
    def slabs(self) -> int:
        """Slabs of K."""
        return -(-self.count // self.held)

    @property
    def pitch(self) -> int:
        """Numbers from one row of a slab of x to the next."""
        return odd_lines(self.slab)

    def in_order(self, place: Expr) -> Expr:
        """The block that is added in this place."""
        return place % self.streams * (self.count // self.streams) + place // self.streams


def blocks_of(shape: Linear) -> Blocks:
    """How the shape's K is cut."""
    k, group = padded_k(shape.weight, shape.k), shape.weight.group_size
    if group:
        count = -(-k // group)
        return Blocks(group, count, 1, min(max(BLOCK // group, 1), count))
    size = _even_block(k, unit_of(shape))
    return Blocks(size, -(-k // size), STREAMS if k % (STREAMS * size) == 0 else 1, 1)


def _even_block(k: int, unit: int) -> int:
    """Steps of a block where there are no groups, in whole units: if possible, such that streams are equal."""
    least = -(-k // BLOCK)
    counts = [n for n in range(least, 2 * least + STREAMS) if n % STREAMS == 0 and k % (n * unit) == 0]
    return k // counts[0] if counts else min(BLOCK, k)


def block_product(level: Level, shape: Linear, blocks: Blocks, rows: int, tiles: int):
    """Inline `product(p, total, x, x_sums, w, s, z)`: set total[: tiles * R * PANEL] to x times panel p.

    x is (slabs, tiles * R, pitch). Sums past N are garbage, but cause no faults.
    """
    build = _product_from_memory if tiles <= FEW_TILES else _product_from_slabs
    add_up = build(level, shape, blocks, rows, tiles)
    vectors = tiles * rows * PANEL // level.lanes

    @T.inline
    def product(p, total, x, x_sums, w, s, z):
        clear_memory(total, vectors, level.lanes)
        add_up(p, total, x, x_sums, as_read(w), s, z)

    return product


def _product_from_memory(level: Level, shape: Linear, blocks: Blocks, rows: int, tiles: int):
    """`block_product` of few tiles: each weight is read into a register for all rows of a tile."""
    size, unit = blocks.size, unit_of(shape)
    together = blocks.streams if blocks.streams * rows * PANEL // level.lanes <= sums_beside_prefetches(level) else 1
    columns = tile_columns(level, rows * together)
    weight = kept_number(shape)
    passes = tiles * PANEL // columns  # over the blocks that are taken together: one block, if they are several
    multiply = _tile_product(level, shape, blocks, rows, columns, together, passes)

    def later(turn):
        """The first step of the next block; the next panel begins where this one ends."""
        return size * T.if_then_else(turn + 1 < blocks.count, blocks.in_order(turn + 1), blocks.count)

    @T.inline
    def tile(p, m, turn, total, x, x_sums, w, s, z):
        for c in T.unroll(PANEL // columns):
            multiply(
                lambda t: blocks.in_order(turn * together + t),
                lambda block, n, o, column: weight(w, p, block * (size // unit) + n, o, unit, column),
                later(turn),
                m,
                c,
                p,
                total,
                x,
                x_sums,
                w,
                s,
                z,
            )

    @T.inline
    def add_up(p, total, x, x_sums, w, s, z):
        for turn in T.serial(blocks.count // together):
            for m in T.serial(tiles):
                tile(p, m, turn, total, x, x_sums, w, s, z)

    return add_up


def _product_from_slabs(level: Level, shape: Linear, blocks: Blocks, rows: int, tiles: int):
    """`block_product` of several tiles: a slab is widened to float32 once for all of them, in the L1 cache.

    Numbers that are float32 already are copied, as that reads them in order, faster than the first tile would.
    """
    k, size, unit = padded_k(shape.weight, shape.k), blocks.size, unit_of(shape)
    lanes, columns = level.lanes, level.tile.columns
    weight = kept_number(shape)
    multiply = _tile_product(level, shape, blocks, rows, columns, 1, 0)

    @T.inline
    def fill(w, p, slab, first):
        for n in T.serial(T.min(blocks.slab, k - first * size) // unit):
            for o in T.unroll(unit):
                for i in T.unroll(PANEL // lanes):
                    for v in T.vectorized(lanes):
                        slab[n * unit + o, i * lanes + v] = weight(
                            w, p, first * (size // unit) + n, o, unit, i * lanes + v
                        )

    @T.inline
    def add_up(p, total, x, x_sums, w, s, z):
        for place in T.serial(blocks.slabs):
            first = T.meta_var(blocks.in_order(place) * blocks.held)
            slab = T.alloc_buffer((blocks.slab, PANEL), "float32")
            fill(w, p, slab, first)
            for m in T.serial(tiles):
                for c in T.unroll(PANEL // columns):
                    for h in T.serial(T.min(blocks.held, blocks.count - first)):
                        multiply(
                            lambda t: first + h,  # noqa: ARG005
                            lambda block, n, o, column: slab[(block - first) * size + n * unit + o, column],
                            0,
                            m,
                            c,
                            p,
                            total,
                            x,
                            x_sums,
                            w,
                            s,
                            z,
                        )

    return add_up


def _tile_product(level: Level, shape: Linear, blocks: Blocks, rows: int, columns: int, together: int, passes: int):
    """Inline `multiply(block, weight, later, m, c, p, total, x, x_sums, w, s, z)`: add blocks to part c of tile m.

    These are the blocks `block(t)` for t < together; `weight(block, n, o, column)` is the weight of step n * unit + o
    of a block. If there are `passes` over them, for the tiles and parts, memory is prefetched, from step `later` on if
    there are several.
    """
    k, size, unit, held = padded_k(shape.weight, shape.k), blocks.size, unit_of(shape), blocks.held
    lanes, parts = level.lanes, columns // level.lanes
    add_sums, fetch = _added_sums(level, shape, rows, columns), fetched_unit(level, shape, passes) if passes else None

    @T.inline
    def multiply(block, weight, later, m, c, p, total, x, x_sums, w, s, z):
        sums = T.alloc_buffer((together * rows * columns,), "float32")
        clear(sums, together * rows * parts, lanes)
        for n in T.serial(size // unit if k % size == 0 else T.min(size, k - block(0) * size) // unit):
            for t in T.unroll(together):
                if passes > 0:
                    fetch(w, p, block(t) * size, n, later, (m * (PANEL // columns) + c) * (size // unit))
                for o in T.unroll(unit):
                    add_outer_product(
                        sums,
                        t * rows * columns,
                        rows,
                        columns,
                        lanes,
                        lambda r: x[block(t) // held, m * rows + r, block(t) % held * size + n * unit + o],
                        lambda column: weight(block(t), n, o, c * columns + column),
                    )
        for t in T.unroll(together):
            add_sums(sums, t * rows * columns, total, m, x_sums, s, z, p, block(t), c)

    return multiply


def _added_sums(level: Level, shape: Linear, rows: int, columns: int):
    """Inline `add_sums(sums, at, total, m, x_sums, s, z, p, g, c)`: add a block's sums, scaled, to part c of tile m.

    sums[at :] is (R, columns), of block g; total is (tiles, R, PANEL).
    """
    stored, lanes, parts = shape.weight, level.lanes, columns // level.lanes
    needs_x_sum = stored.offsets != "none" or format_of(stored).words

    def scaled(found, x_sums, row, s, z, p, g, column):
        if not stored.grouped:
            return found
        return group_total(stored, found, x_sums[row, g] if needs_x_sum else None, s, z, p, g, column)

    @T.inline
    def add_sums(sums, at, total, m, x_sums, s, z, p, g, c):
        for r in T.unroll(rows):
            for i in T.unroll(parts):
                for v in T.vectorized(lanes):
                    total[(m * rows + r) * PANEL + c * columns + i * lanes + v] = total[
                        (m * rows + r) * PANEL + c * columns + i * lanes + v
                    ] + scaled(
                        sums[at + r * columns + i * lanes + v],
                        x_sums,
                        m * rows + r,
                        s,
                        z,
                        p,
                        g,
                        c * columns + i * lanes + v,
                    )

    return add_sums
