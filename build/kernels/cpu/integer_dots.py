"""Products of whole numbers by dot products of four: weights as they are read, or unpacked once for many rows."""

from collections.abc import Callable
from typing import Any

from tvm.ir import Expr
from tvm.script import tirx as T

from build.kernels.cpu.dot import NIBBLES, Dot
from build.kernels.cpu.integer_blocks import STEP, above_value, block_count, block_part, block_size, fold
from build.kernels.cpu.integer_row import padded_steps
from build.kernels.cpu.level import FEW_TILES, Level, sums_beside_prefetches
from build.kernels.cpu.panels import ITEMSIZE
from build.kernels.cpu.vector import AHEAD, LINE, NEAR, clear_memory, prefetch
from build.kernels.shapes import Linear
from export.weights.table import format_of
from runtime.artifact.layouts import DOT, PANEL, WORD

HELD_STEPS = 256  # steps of K that are unpacked at a time, if blocks are not longer


def dot_product(level: Level, shape: Linear, dot: Dot, rows: int, tiles: int):
    """Inline `product(p, total, x, x_scales, x_sums, w, s, z)`: set total (tiles, R, PANEL) to x times panel p.

    For few tiles, weights are used as they are read; for more, a block of them is unpacked once for all.
    """
    block_steps, steps, x_steps = block_size(shape) // DOT, -(-shape.k // DOT), padded_steps(shape.k, DOT) // DOT
    vectors = tiles * rows * PANEL // level.lanes
    sums_of_row = dot.planes * PANEL * dot.partials
    fill, add_tile = _slab(shape, dot), _added_tile(level, shape, dot, rows)
    multiply_as_read = _tile_product_from_memory(level, shape, dot, rows)
    add = fold(level, shape, dot.offset, dot.planes, dot.partials)
    # Blocks that are unpacked at a time: the more, the less often totals are read; the slab stays in the L1 cache.
    held = max(HELD_STEPS // block_size(shape), 1)

    def count(b):
        return T.min(block_steps, steps - b * block_steps)

    @T.inline
    def few_tiles(p, total, x, x_scales, x_sums, w, s, z):
        clear_memory(total, vectors, level.lanes)
        for b in T.serial(block_count(shape)):
            sums = T.alloc_buffer((rows * sums_of_row,), "int32")
            multiply_as_read(x, 0, True, w, p, b, count(b), sums)
            for r in T.serial(rows):
                add(sums, r * sums_of_row, x_scales, x_sums, r, s, z, p, b, total)
            for m in T.serial(tiles - 1):
                multiply_as_read(x, (m + 1) * x_steps, False, w, p, b, count(b), sums)
                for r in T.serial(rows):
                    add(sums, r * sums_of_row, x_scales, x_sums, (m + 1) * rows + r, s, z, p, b, total)

    @T.inline
    def many_tiles(p, total, x, x_scales, x_sums, w, s, z):
        clear_memory(total, vectors, level.lanes)
        for g in T.serial(-(-block_count(shape) // held)):
            slab = T.alloc_buffer((held * block_steps * STEP,), dot.slab_dtype)
            fill(w, p, g * held, T.min(held * block_steps, steps - g * held * block_steps), slab)
            for m in T.serial(tiles):
                for h in T.serial(T.min(held, block_count(shape) - g * held)):
                    add_tile(
                        x,
                        slab,
                        h * block_steps,
                        m * x_steps + (g * held + h) * block_steps,
                        count(g * held + h),
                        x_scales,
                        x_sums,
                        m * rows,
                        s,
                        z,
                        p,
                        g * held + h,
                        total,
                    )

    return few_tiles if tiles <= FEW_TILES else many_tiles


def _tile_product_from_memory(level: Level, shape: Linear, dot: Dot, rows: int):
    """Inline `multiply(x, x_step, fetches, w, p, b, count, sums)`: set sums to a tile of x times block b of panel p.

    sums is (R, planes, PANEL * partials); the tile of x begins at four steps of number `x_step`, and `count` is the
    number of steps of K, four at a time. Each weight is read into a register for all rows.
    """
    steps, block_steps, products = -(-shape.k // DOT), block_size(shape) // DOT, rows * dot.planes
    vectors = STEP // dot.vector
    wide = next(
        n
        for n in (vectors, vectors // 2, vectors // 4, 1)
        if n and (products * n <= sums_beside_prefetches(level) or n == 1)
    )
    each, (size, dtype, kept) = _steps_at_once(shape), _flat(shape, dot)
    step_size, ahead = size // (-(-shape.n // PANEL) * steps), NEAR // 4 if dtype == "int32" else AHEAD
    lines, per_line = each * step_size * ITEMSIZE[dtype] // LINE, LINE // ITEMSIZE[dtype]
    clear_sums, store = _cleared(dot, rows, wide), _sums_stored(dot, rows, wide)

    @T.inline
    def multiply(x, x_step, fetches, w, p, b, count, sums):
        flat = T.decl_buffer((size,), dtype, data=w.data)
        for c in T.unroll(vectors // wide):
            kept_sums = T.alloc_buffer((products * wide * dot.lanes,), "int32")
            clear_sums(kept_sums)
            for d in T.serial(count // each):
                at = (p * steps + b * block_steps + d * each) * step_size
                if fetches and c == 0:
                    for line in T.unroll(lines):
                        prefetch(flat, at + ahead + line * per_line)
                for i in T.unroll(wide):
                    for part in T.unroll(each):
                        for r in T.unroll(products):
                            kept_sums[T.ramp((r * wide + i) * dot.lanes, 1, dot.lanes)] = dot.add(
                                kept_sums[T.ramp((r * wide + i) * dot.lanes, 1, dot.lanes)],
                                kept(flat, at, c * wide + i, part),
                                x,
                                ((x_step + b * block_steps + d * each + part) * products + r) * DOT,
                            )
            store(kept_sums, sums, c)

    return multiply


def _cleared(dot: Dot, rows: int, wide: int):
    """Inline `clear_sums(kept)`: clear the sums (R * planes, `wide` vectors) that stay in registers."""

    @T.inline
    def clear_sums(kept):
        for i in T.unroll(rows * dot.planes * wide):
            kept[T.ramp(i * dot.lanes, 1, dot.lanes)] = T.broadcast(T.int32(0), dot.lanes)

    return clear_sums


def _sums_stored(dot: Dot, rows: int, wide: int):
    """Inline `store(kept, sums, c)`: put sums from registers into part c of sums (R, planes, PANEL * partials)."""
    plane = PANEL * dot.partials

    @T.inline
    def store(kept, sums, c):
        for r in T.unroll(rows * dot.planes):
            for i in T.unroll(wide):
                sums[T.ramp(r * plane + (c * wide + i) * dot.lanes, 1, dot.lanes)] = kept[
                    T.ramp((r * wide + i) * dot.lanes, 1, dot.lanes)
                ]

    return store


def _steps_at_once(shape: Linear) -> int:
    """How many times four steps are read together: twice in a word of int4."""
    return WORD // DOT if format_of(shape.weight).words else 1


def _flat(shape: Linear, dot: Dot) -> tuple[int, str, Callable[..., Expr]]:
    """The number of elements of W packed, their dtype, and `kept(flat, at, i, part)`, a TIR expression.

    That is vector i of four steps as the dot keeps weights; `at` is where the steps that are read together begin, and
    `part` counts those.
    """
    panels, columns = -(-shape.n // PANEL), dot.columns

    def from_bytes(flat: Any, at: Expr, i: Expr, _part: Expr) -> Expr:
        return dot.widened(flat[T.ramp(at + i * dot.vector, 1, dot.vector)], dot.vector)

    def from_halves(flat: Any, at: Expr, i: Expr, part: Expr) -> Expr:
        words = flat[T.ramp(at + i * columns, 1, columns)]
        return dot.from_bytes((words >> T.broadcast(4 * part, columns)) & T.broadcast(T.int32(NIBBLES), columns))

    if format_of(shape.weight).words:
        return panels * (shape.k // WORD) * PANEL, "int32", from_halves
    return panels * -(-shape.k // DOT) * STEP, "int8", from_bytes


def _slab(shape: Linear, dot: Dot):
    """Inline `fill(w, p, b, count, slab)`: `count` * 4 steps of panel p from block b on, as the dot keeps weights."""
    steps, block_steps = -(-shape.k // DOT), block_size(shape) // DOT
    vectors, vector = STEP // dot.vector, dot.vector
    each, (size, dtype, kept) = _steps_at_once(shape), _flat(shape, dot)
    step_size = size // (-(-shape.n // PANEL) * steps)

    @T.inline
    def fill(w, p, b, count, slab):
        flat = T.decl_buffer((size,), dtype, data=w.data)
        for d in T.serial(count // each):
            at = (p * steps + b * block_steps + d * each) * step_size
            for i in T.unroll(vectors):
                for part in T.unroll(each):
                    slab[T.ramp((d * each + part) * STEP + i * vector, 1, vector)] = kept(flat, at, i, part)

    return fill


def _added_tile(level: Level, shape: Linear, dot: Dot, rows: int):
    """Inline `add(x, slab, step, x_step, count, x_scales, x_sums, row, s, z, p, b, total)`.

    It adds block b, of a tile of x times the slab, to total[row :]. `count` is the number of steps of K, four at a
    time; those of x begin at `x_step`, those of the slab at `step`. Sums stay in registers until they are floats.
    """
    wide = max(level.tile.columns // level.lanes, 1)  # vectors of weights at a time
    vectors, products, planes = STEP // dot.vector, rows * dot.planes, dot.planes
    lanes, columns = dot.lanes, wide * dot.columns
    width = min(level.lanes, columns)
    above = above_value(shape.weight, dot.offset)
    part = block_part(shape, above, shape.weight.zero_points, planes, dot.partials, columns)
    clear_sums = _cleared(dot, rows, wide)

    @T.inline
    def add(x, slab, step, x_step, count, x_scales, x_sums, row, s, z, p, b, total):
        for c in T.serial(vectors // wide):
            kept = T.alloc_buffer((products * wide * lanes,), "int32")
            clear_sums(kept)
            for d in T.serial(count):
                for r in T.unroll(products):
                    for i in T.unroll(wide):
                        kept[T.ramp((r * wide + i) * lanes, 1, lanes)] = dot.add(
                            kept[T.ramp((r * wide + i) * lanes, 1, lanes)],
                            slab[T.ramp((step + d) * STEP + (c * wide + i) * dot.vector, 1, dot.vector)],
                            x,
                            ((x_step + d) * products + r) * DOT,
                        )
            for r in T.unroll(rows):
                for i in T.unroll(columns // width):
                    for v in T.vectorized(width):
                        total[(row + r) * PANEL + c * columns + i * width + v] = total[
                            (row + r) * PANEL + c * columns + i * width + v
                        ] + part(
                            kept,
                            (r * planes * columns - c * columns) * dot.partials,
                            x_scales,
                            x_sums,
                            row + r,
                            s,
                            z,
                            p,
                            b,
                            c * columns + i * width + v,
                        )

    return add
