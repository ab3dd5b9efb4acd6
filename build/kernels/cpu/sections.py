"""Panels of numbers of a byte or half a byte, times x: K is cut into sections, each is summed in strands, and then all.

A section is a group of numbers that share a scale or, without groups, BLOCK steps. Its strands take turns of adjacent
steps: several strands hide the latency of a multiply-add, and a word of int4 has two halves. Their sum, scaled, is
added to the output.
"""

from dataclasses import dataclass

from tvm.ir import Expr
from tvm.script import tirx as T

from build.kernels.cpu.level import FEW_TILES, Level, sums_beside_prefetches, tile_columns
from build.kernels.cpu.panels import ahead, group_total, kept_number
from build.kernels.cpu.vector import AHEAD, LINE, NEAR, add_outer_product, clear, prefetch
from build.kernels.shapes import Linear
from export.weights.table import format_of
from runtime.artifact.layouts import DOT, PANEL, WORD

BLOCK = 256  # steps of a section of numbers without groups


@dataclass(frozen=True)
class Sections:
    """A way to cut K into sections of `size` steps (the last may be shorter), whose strands take turns."""

    size: int
    count: int  # strands
    width: int  # adjacent steps that a strand takes at a time

    @property
    def turn(self) -> int:
        """Steps until the first strand goes on."""
        return self.count * self.width

    @property
    def strand(self) -> int:
        """Steps of a strand."""
        return self.size // self.count

    def place(self, turn: Expr, offset: Expr) -> Expr:
        """The place of step `turn * self.turn + offset` of a section if its strands follow one another."""
        return offset // self.width * self.strand + turn * self.width + offset % self.width


def sections_of(shape: Linear) -> Sections:
    """How the shape's K is cut."""
    stored, k = shape.weight, shape.k
    if format_of(stored).words:
        return Sections(stored.group_size or k, WORD // DOT, DOT)
    size = stored.group_size or min(BLOCK, k)
    return Sections(size, 1 if size % 2 or k % 2 else 2, 1)


def section_product(level: Level, shape: Linear, sections: Sections, rows: int, tiles: int):
    """Inline `product(p, total, x, x_sums, w, s, z)`: set total[: tiles * R * PANEL] to x times panel p.

    x is (tiles, K, R); of more than FEW_TILES, the strands of each of its sections follow one another. Sums past N are
    garbage, but cause no faults.
    """
    if tiles <= FEW_TILES:
        return _product_from_memory(level, shape, sections, rows, tiles)
    return _product_from_slab(level, shape, sections, rows, tiles)


def _product_from_memory(level: Level, shape: Linear, sections: Sections, rows: int, tiles: int):
    """`section_product` of few tiles: each weight is read into a register for all rows of a tile."""
    k, size = shape.k, sections.size
    lanes, parts = level.lanes, PANEL // level.lanes
    room = max(sums_beside_prefetches(level) // (rows * parts), 1)
    together = max(n for n in range(1, sections.count + 1) if sections.count % n == 0 and n <= room)
    columns = tile_columns(level, rows * together)
    sums_of_section = _sums_of_section(level, shape, sections, rows, columns, together)
    add_section = _section_end(level, shape, sections, rows, columns)

    @T.inline
    def tile(m, first, p, total, x, x_sums, w, s, z, g):
        for c in T.unroll(PANEL // columns):
            sums = T.alloc_buffer((sections.count, rows * columns), "float32")
            for part in T.unroll(sections.count // together):
                sums_of_section(w, p, x, m, g, c, part * together, first and c + part == 0, sums)
            add_section(sums, total, m, x_sums, s, z, p, g, c)

    @T.inline
    def product(p, total, x, x_sums, w, s, z):
        for i in T.serial(tiles * rows * parts):
            for v in T.vectorized(lanes):
                total[i * lanes + v] = T.float32(0)
        for g in T.serial(-(-k // size)):
            tile(0, True, p, total, x, x_sums, w, s, z, g)
            for m in T.serial(tiles - 1):
                tile(m + 1, False, p, total, x, x_sums, w, s, z, g)

    return product


def _sums_of_section(level: Level, shape: Linear, sections: Sections, rows: int, columns: int, together: int):
    """Inline `add_up(w, p, x, m, g, c, first, fetches, sums)`: set sums[first : first + together] to x times strands.

    These are strands of section g, for tile m and part c of panel p.
    """
    k, size, turn, width = shape.k, sections.size, sections.turn, sections.width
    lanes, vectors = level.lanes, rows * columns // level.lanes
    weight, fetch = kept_number(shape), _fetched_turn(shape, sections)

    @T.inline
    def add_up(w, p, x, m, g, c, first, fetches, sums):
        kept = T.alloc_buffer((together * rows * columns,), "float32")
        clear(kept, together * vectors, lanes)
        for n in T.serial(T.min(size, k - g * size) // turn):
            if fetches:
                fetch(w, p, g * size + n * turn)
            for o in T.unroll(together * width):
                add_outer_product(
                    kept,
                    o // width * rows * columns,
                    rows,
                    columns,
                    lanes,
                    lambda r: x[m, g * size + n * turn + first * width + o, r],
                    lambda column: weight(w, p, g * (size // turn) + n, first * width + o, turn, c * columns + column),
                )
        for u in T.unroll(together):
            for i in T.unroll(vectors):
                for v in T.vectorized(lanes):
                    sums[first + u, i * lanes + v] = kept[(u * vectors + i) * lanes + v]

    return add_up


def _product_from_slab(level: Level, shape: Linear, sections: Sections, rows: int, tiles: int):
    """`section_product` of several tiles: a slab of whole sections is widened to float32 once for all of them."""
    k, size, turn, count, strand = shape.k, sections.size, sections.turn, sections.count, sections.strand
    columns, lanes, parts = level.tile.columns, level.lanes, PANEL // level.lanes
    held = max(level.tile.depth // size, 1)  # sections in a slab
    weight = kept_number(shape)
    add_section = _section_end(level, shape, sections, rows, columns)
    n_sections = -(-k // size)

    @T.inline
    def fill(w, p, first, slab):
        for n in T.serial(T.min(held * size, k - first * size) // turn):
            for o in T.unroll(turn):
                for i in T.unroll(parts):
                    for v in T.vectorized(lanes):
                        slab[n // (size // turn) * size + sections.place(n % (size // turn), o), i * lanes + v] = (
                            weight(w, p, first * (size // turn) + n, o, turn, i * lanes + v)
                        )

    @T.inline
    def multiply(x, slab, m, first, h, c, total, x_sums, s, z, p):
        sums = T.alloc_buffer((count, rows * columns), "float32")
        for u in T.unroll(count):
            kept = T.alloc_buffer((rows * columns,), "float32")
            clear(kept, rows * columns // lanes, lanes)
            for d in T.serial(T.min(size, k - (first + h) * size) // count):
                add_outer_product(
                    kept,
                    0,
                    rows,
                    columns,
                    lanes,
                    lambda r: x[m, (first + h) * size + u * strand + d, r],
                    lambda column: slab[h * size + u * strand + d, c * columns + column],
                )
            for i in T.unroll(rows * columns // lanes):
                for v in T.vectorized(lanes):
                    sums[u, i * lanes + v] = kept[i * lanes + v]
        add_section(sums, total, m, x_sums, s, z, p, first + h, c)

    @T.inline
    def product(p, total, x, x_sums, w, s, z):
        slab = T.alloc_buffer((held * size, PANEL), "float32")
        for i in T.serial(tiles * rows * parts):
            for v in T.vectorized(lanes):
                total[i * lanes + v] = T.float32(0)
        for block in T.serial(-(-n_sections // held)):
            fill(w, p, block * held, slab)
            for m in T.serial(tiles):
                for c in T.serial(PANEL // columns):
                    for h in T.serial(T.min(held, n_sections - block * held)):
                        multiply(x, slab, m, block * held, h, c, total, x_sums, s, z, p)

    return product


def _fetched_turn(shape: Linear, sections: Sections):
    """Inline `fetch(w, p, step)`: prefetch as much as the turn of strands from `step` on takes, some way ahead."""
    turn = sections.turn

    @T.inline
    def fetch_word(w, p, step):
        for line in T.unroll(PANEL * 4 // LINE):
            prefetch(w, p, step // WORD + NEAR // (PANEL * 4), line * LINE // 4)

    @T.inline
    def fetch_numbers(w, p, step):
        for line in T.unroll(-(-turn * PANEL // LINE)):
            ahead(w, p, step + (AHEAD + line * LINE) // PANEL)

    return fetch_word if format_of(shape.weight).words else fetch_numbers


def _section_end(level: Level, shape: Linear, sections: Sections, rows: int, columns: int):
    """Inline `add_section(sums, total, m, x_sums, s, z, p, g, c)`: add the scaled sum of a section's strands to total.

    sums is (strands, R, columns), for tile m and part c of the panel; total is (tiles, R, PANEL).
    """
    stored, lanes, parts = shape.weight, level.lanes, columns // level.lanes

    def scaled(sums, x_sums, row, s, z, p, g, at, column):
        total = sums[0, at]
        for u in range(1, sections.count):
            total = total + sums[u, at]
        if not stored.grouped:
            return total
        x_sum = x_sums[row, g] if stored.offsets != "none" or format_of(stored).words else None
        return group_total(stored, total, x_sum, s, z, p, g, column)

    @T.inline
    def add_section(sums, total, m, x_sums, s, z, p, g, c):
        for r in T.unroll(rows):
            for i in T.unroll(parts):
                for v in T.vectorized(lanes):
                    total[(m * rows + r) * PANEL + c * columns + i * lanes + v] = total[
                        (m * rows + r) * PANEL + c * columns + i * lanes + v
                    ] + scaled(
                        sums,
                        x_sums,
                        m * rows + r,
                        s,
                        z,
                        p,
                        g,
                        r * columns + i * lanes + v,
                        c * columns + i * lanes + v,
                    )

    return add_section
