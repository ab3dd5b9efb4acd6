"""Products of whole numbers in AMX's tiles, for many rows: weights are multiplied as they lie in their panels.

Four steps of 16 outputs are a row of a tile, so that half a panel is a column of tiles already. int4 is unpacked into
that form once for all rows, and so is a panel whose K ends within a tile.

Up to four tiles of sums are in flight: two of x (of neighbouring rows, or the two planes of the same rows) times the
two of a panel. Measured on Sapphire Rapids, in cycles for each product of 16 rows, of which the unit takes 16: sums
that are stored right after their product make the next product wait, 28 to 35; stored when their tile is next needed,
with all loads in front, 21 to 22; and up to 64 if x, weights and sums together exceed the L1 cache. Converting and
scaling the sums takes two vector operations for each 16 of them, of which only one starts in a cycle while tiles are in
use: 32 cycles for each product, so that this, and not the product, is the limit where groups are as short as a tile.
"""

from dataclasses import dataclass

from tvm.script import tirx as T

from build.kernels.cpu.amx import (
    MOST_TILES,
    TILE_BYTES,
    TILE_ROWS,
    clear_tile,
    configured,
    load_tile,
    multiply_tiles,
    release,
    store_tile,
)
from build.kernels.cpu.dot import NIBBLES
from build.kernels.cpu.integer_blocks import STEP, block_count, block_part, block_size, word_offset
from build.kernels.cpu.integer_row import PackedRows
from build.kernels.cpu.level import Level
from build.kernels.cpu.vector import clear_memory
from build.kernels.shapes import Linear
from export.weights.table import format_of
from runtime.artifact.layouts import DOT, PANEL, WORD

COLUMNS = TILE_BYTES // DOT  # outputs of a tile
HALVES = PANEL // COLUMNS  # tiles side by side in a panel
X_TILES = 2  # at most, at a time
SUMS = MOST_TILES - X_TILES * HALVES  # the first tile of sums
TOGETHER = 4  # blocks that are folded at a time, so that sums of rows are read and written less often
DEPTHS = (TILE_BYTES, TILE_BYTES // 2)  # steps of a tile


@dataclass(frozen=True)
class Tiles:
    """How a product is cut into tiles."""

    x: PackedRows
    at_once: int  # tiles of rows that are multiplied at a time
    zero_points: bool  # whether they remain in the tiles of weights

    @property
    def x_tiles(self) -> int:
        """Tiles of x at a time."""
        return self.at_once * self.x.planes

    @property
    def sums_of_block(self) -> int:
        """int32 sums of a block, of all rows at a time: (tiles of rows, rows, planes, PANEL)."""
        return self.x_tiles * self.x.rows * PANEL

    @property
    def configure(self):
        """Inline that describes the tiles to the processor."""
        rows, depth = self.x.rows, self.x.span
        x_tile, weights, sums = (rows, depth), (depth // DOT, TILE_BYTES), (rows, TILE_BYTES)
        return configured((*[x_tile] * X_TILES, *[weights] * HALVES, *[sums] * (X_TILES * HALVES)))


def tiles_of(shape: Linear) -> Tiles | None:
    """How `shape` is cut into tiles; None if its groups are too short for that."""
    stored = shape.weight
    depth = next((depth for depth in DEPTHS if block_size(shape) % depth == 0), None)
    if depth is None:
        return None
    planes = 2 if stored.rounding == "int16" else 1
    at_once = X_TILES // planes if shape.rows > TILE_ROWS else 1
    units = -(-shape.rows // (TILE_ROWS * at_once))
    rows = -(-shape.rows // (units * at_once))
    steps = -(-shape.k // depth) * depth
    x = PackedRows(units * at_once, rows, steps, depth, planes, "int8")
    return Tiles(x, at_once, stored.zero_points and not format_of(stored).words)


def tile_product(level: Level, shape: Linear, tiles: Tiles):
    """Inline `product(p, total, x, x_scales, x_sums, w, s, z)`: set total (tiles, R, PANEL) to x times panel p."""
    x, lanes = tiles.x, level.lanes
    fill = _unpacked_words(shape) if format_of(shape.weight).words else _padded_panel(shape)
    as_it_lies = not format_of(shape.weight).words and shape.k % x.span == 0
    panels, panel_size = -(-shape.n // PANEL), x.steps * PANEL
    full, rest = divmod(block_count(shape), TOGETHER)
    add_blocks = _added_blocks(level, shape, tiles, TOGETHER)
    add_rest = _added_blocks(level, shape, tiles, rest)

    configure = tiles.configure

    @T.inline
    def multiply(p, total, x, x_scales, x_sums, weights, at, s, z):
        sums = T.alloc_buffer((TOGETHER * tiles.sums_of_block,), "int32")
        clear_memory(total, tiles.x.count * PANEL // lanes, lanes)
        configure()
        for m in T.serial(tiles.x.tiles // tiles.at_once):
            for g in T.serial(full):
                add_blocks(p, g * TOGETHER, m, total, x, x_scales, x_sums, weights, at, s, z, sums)
            if rest > 0:
                add_rest(p, full * TOGETHER, m, total, x, x_scales, x_sums, weights, at, s, z, sums)
        release()

    @T.inline
    def product(p, total, x, x_scales, x_sums, w, s, z):
        if as_it_lies:
            flat = T.decl_buffer((panels * panel_size,), "int8", data=w.data)
            multiply(p, total, x, x_scales, x_sums, flat, p * panel_size, s, z)
        else:
            slab = T.alloc_buffer((panel_size,), "int8")
            fill(w, z, p, slab)
            multiply(p, total, x, x_scales, x_sums, slab, 0, s, z)

    return product


def _added_blocks(level: Level, shape: Linear, tiles: Tiles, count: int):
    """Inline `add(p, b, m, total, x, x_scales, x_sums, weights, at, s, z, sums)`: add blocks b to b + count to total.

    They are those of unit m of rows; the panel's weights, in the form of tiles, begin at weights[at].
    """
    unit_rows, lanes = tiles.at_once * tiles.x.rows, level.lanes
    multiply = _multiplied_block(shape, tiles)
    store = _sums_stored(tiles)
    part = block_part(shape, 0, tiles.zero_points, tiles.x.planes, 1)
    sums_of_row = tiles.x.planes * PANEL

    def folded(total, sums, r, x_scales, x_sums, row, s, z, p, b, column):
        for q in range(count):
            at = q * tiles.sums_of_block + r * sums_of_row
            total = total + part(sums, at, x_scales, x_sums, row, s, z, p, b + q, column)
        return total

    @T.inline
    def add(p, b, m, total, x, x_scales, x_sums, weights, at, s, z, sums):
        for q in T.unroll(count):
            multiply(x, m, weights, at, b + q, sums, q)
        for t in T.unroll(tiles.x_tiles * HALVES):
            store(sums, count - 1, t)
        for r in T.serial(unit_rows):
            for i in T.unroll(PANEL // lanes):
                for v in T.vectorized(lanes):
                    total[(m * unit_rows + r) * PANEL + i * lanes + v] = folded(
                        total[(m * unit_rows + r) * PANEL + i * lanes + v],
                        sums,
                        r,
                        x_scales,
                        x_sums,
                        m * unit_rows + r,
                        s,
                        z,
                        p,
                        b,
                        i * lanes + v,
                    )

    return add


def _sums_stored(tiles: Tiles):
    """Inline `store(sums, q, t)`: store tile t of sums, as those of block q of the blocks that are folded together."""
    x, planes = tiles.x, tiles.x.planes

    @T.inline
    def store(sums, q, t):
        a, half = t // HALVES, t % HALVES
        store_tile(
            SUMS + t,
            sums,
            q * tiles.sums_of_block + (a // planes * x.rows * planes + a % planes) * PANEL + half * COLUMNS,
            planes * PANEL * 4,
        )

    return store


def _multiplied_block(shape: Linear, tiles: Tiles):
    """Inline `multiply(x, m, weights, at, b, sums, q)`: multiply block b, and store the sums of the one before.

    So each tile of sums is stored when it is next needed. q counts the blocks that are folded together.
    """
    x_form, depth = tiles.x, tiles.x.span
    per_block, planes = block_size(shape) // depth, tiles.x.planes
    n_tiles = x_form.steps // depth
    store = _sums_stored(tiles)

    @T.inline
    def load(x, m, weights, at, t):
        for a in T.unroll(tiles.x_tiles):
            load_tile(
                a,
                x,
                x_form.start(m * tiles.at_once + a // planes, t * depth) + a % planes * depth,
                planes * depth,
            )
        for half in T.unroll(HALVES):
            load_tile(X_TILES + half, weights, at + t * (depth // DOT) * STEP + half * TILE_BYTES, STEP)

    @T.inline
    def multiply(x, m, weights, at, b, sums, q):
        load(x, m, weights, at, b * per_block)
        for t in T.unroll(tiles.x_tiles * HALVES):
            if q > 0:
                store(sums, q - 1, t)
            clear_tile(SUMS + t)
            multiply_tiles(SUMS + t, t // HALVES, X_TILES + t % HALVES)
        for n in T.serial(T.min(per_block, n_tiles - b * per_block) - 1):
            load(x, m, weights, at, b * per_block + n + 1)
            for t in T.unroll(tiles.x_tiles * HALVES):
                multiply_tiles(SUMS + t, t // HALVES, X_TILES + t % HALVES)

    return multiply


def _padded_panel(shape: Linear):
    """Inline `fill(w, _z, p, slab)`: panel p of int8. Its steps past K meet zeros of x, whatever they are."""
    steps, panels = -(-shape.k // DOT), -(-shape.n // PANEL)

    @T.inline
    def fill(w, _z, p, slab):
        flat = T.decl_buffer((panels * steps * STEP,), "int8", data=w.data)
        for d in T.serial(steps):
            for v in T.vectorized(STEP):
                slab[d * STEP + v] = flat[(p * steps + d) * STEP + v]

    return fill


def _unpacked_words(shape: Linear):
    """Inline `fill(w, z, p, slab)`: panel p of int4, less its offset or zero points."""
    stored, panels, words, block = shape.weight, -(-shape.n // PANEL), shape.k // WORD, block_size(shape)

    def zeros(z, p, word, half):
        if not stored.zero_points:
            return T.broadcast(T.int8(word_offset(stored)), TILE_BYTES)
        found = T.Cast(f"int32x{COLUMNS}", z[p, word * WORD // block, T.ramp(half * COLUMNS, 1, COLUMNS)])
        return T.reinterpret(f"int8x{TILE_BYTES}", found * T.broadcast(T.int32(0x01010101), COLUMNS))

    @T.inline
    def fill(w, z, p, slab):
        flat = T.decl_buffer((panels * words * PANEL,), "int32", data=w.data)
        for d in T.serial(words):
            for half in T.unroll(HALVES):
                for part in T.unroll(WORD // DOT):
                    slab[T.ramp((d * (WORD // DOT) + part) * STEP + half * TILE_BYTES, 1, TILE_BYTES)] = T.reinterpret(
                        f"int8x{TILE_BYTES}",
                        (
                            flat[T.ramp((p * words + d) * PANEL + half * COLUMNS, 1, COLUMNS)]
                            >> T.broadcast(4 * part, COLUMNS)
                        )
                        & T.broadcast(T.int32(NIBBLES), COLUMNS),
                    ) - zeros(z, p, d, half)

    return fill
