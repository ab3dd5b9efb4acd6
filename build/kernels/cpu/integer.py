"""Products of whole numbers: neighbours among a token's x share a scale, and sums within a group are int32.

x = q s with s = max |x| / levels and q = round(x / s), exactly as in the ONNX graph. y is the sum, over the groups of
K, of s times the sum of q w, times the weight's scale, which may be that of the group. The sum over a block of K is
less than 256 * 32512 * 255 = 2^31 - 25 * 10^6 in any case.
"""

from collections.abc import Callable
from typing import Any

from tvm.ir import Expr
from tvm.script import tirx as T

from build.kernels.cpu.dot import NIBBLES, Dot, WordDot
from build.kernels.cpu.epilogue import panel_outputs
from build.kernels.cpu.level import FEW_TILES, Level, balanced_rows, sums_beside_prefetches
from build.kernels.cpu.panels import ITEMSIZE
from build.kernels.cpu.row import prepared_row, rounded_row
from build.kernels.cpu.vector import AHEAD, LINE, NEAR, prefetch, widened
from build.kernels.shapes import Linear
from export.weights.format import Storage
from export.weights.table import format_of
from runtime.artifact.layouts import DOT, PANEL, WORD, WORD_ZERO

BLOCK = 256  # steps of K whose sum stays an integer, where x has one scale per row
WORD_ROWS = 8  # rows, times planes of x, whose sums of a word stay in the 16 registers of AVX2
STEP = PANEL * DOT  # weights of a panel in four steps of K


def integer_rows(level: Level, shape: Linear, dot: Dot, words: WordDot | None):
    """Body of `linear` in integers, for any number of rows; int4 is multiplied by `words` if there is such a product.

    As in `float_rows`, x lies in tiles, and a row of y has the same bits whichever rows are computed with it.
    """
    direct = words if format_of(shape.weight).words else None
    k, planes = shape.k, (direct or dot).planes
    rows = balanced_rows(shape.rows, max((WORD_ROWS if direct else level.tile.rows) // planes, 1))
    tiles = -(-shape.rows // rows)
    n_blocks, together = _blocks(shape), shape.weight.rounded_together(k)
    panels = -(-shape.n_out // PANEL)
    x_steps = -(-k // WORD) * WORD // DOT  # x is padded to whole words
    x_dtype = "int8" if direct else dot.x_dtype
    product = (
        _word_product(level, shape, direct, rows, tiles) if direct else _dot_product(level, shape, dot, rows, tiles)
    )
    round_row = _integer_row(level, shape, planes)
    compute = panel_outputs(level, shape, tiles * rows, product)

    @T.inline
    def pack(x_rows, gain, order, i, x, x_scales, x_sums):
        at = (i // rows * x_steps * rows + i % rows) * DOT * planes
        # Rows past the last repeat it and are not stored.
        round_row(x_rows, T.min(i, shape.rows - 1), gain, order, x, at, rows * DOT * planes, x_scales, x_sums, i)

    @T.inline
    def body(x_rows, gain, order, w, s, z, residual, y):
        x = T.alloc_buffer((tiles * x_steps * rows * planes * DOT,), x_dtype)  # (tiles, K / 4, R, planes, 4)
        x_scales = T.alloc_buffer((tiles * rows, k // together), "float32")
        x_sums = T.alloc_buffer((tiles * rows, n_blocks), "int32")
        if shape.rows == 1:
            pack(x_rows, gain, order, 0, x, x_scales, x_sums)
        else:
            for i in T.parallel(tiles * rows):
                pack(x_rows, gain, order, i, x, x_scales, x_sums)
        for p in T.parallel(panels):
            compute(p, residual, y, s, x, x_scales, x_sums, w, s, z)

    return body


def _dot_product(level: Level, shape: Linear, dot: Dot, rows: int, tiles: int):
    """Inline `product(p, total, x, x_scales, x_sums, w, s, z)`: set total (tiles, R, PANEL) to x times panel p.

    For few tiles, weights are used as they are read; for more, a block of them is unpacked once for all.
    """
    block_steps, steps, x_steps = _block(shape) // DOT, -(-shape.k // DOT), -(-shape.k // WORD) * WORD // DOT
    vectors = tiles * rows * PANEL // level.lanes
    sums_of_row = dot.planes * PANEL * dot.partials
    fill, multiply = _slab(shape, dot), _tile_product(level, dot, rows)
    multiply_as_read = _tile_product_from_memory(level, shape, dot, rows)
    fold = _fold(level, shape, dot.offset, dot.planes, dot.partials)

    def count(b):
        return T.min(block_steps, steps - b * block_steps)

    @T.inline
    def clear_total(total):
        for i in T.serial(vectors):
            for v in T.vectorized(level.lanes):
                total[i * level.lanes + v] = T.float32(0)

    @T.inline
    def few_tiles(p, total, x, x_scales, x_sums, w, s, z):
        clear_total(total)
        for b in T.serial(_blocks(shape)):
            sums = T.alloc_buffer((rows * sums_of_row,), "int32")
            multiply_as_read(x, 0, True, w, p, b, count(b), sums)
            for r in T.serial(rows):
                fold(sums, r * sums_of_row, x_scales, x_sums, r, s, z, p, b, total)
            for m in T.serial(tiles - 1):
                multiply_as_read(x, (m + 1) * x_steps, False, w, p, b, count(b), sums)
                for r in T.serial(rows):
                    fold(sums, r * sums_of_row, x_scales, x_sums, (m + 1) * rows + r, s, z, p, b, total)

    @T.inline
    def many_tiles(p, total, x, x_scales, x_sums, w, s, z):
        clear_total(total)
        for b in T.serial(_blocks(shape)):
            sums = T.alloc_buffer((rows * sums_of_row,), "int32")
            slab = T.alloc_buffer((block_steps * STEP,), dot.slab_dtype)
            fill(w, p, b, count(b), slab)
            for m in T.serial(tiles):
                multiply(x, slab, m * x_steps + b * block_steps, count(b), sums)
                for r in T.serial(rows):
                    fold(sums, r * sums_of_row, x_scales, x_sums, m * rows + r, s, z, p, b, total)

    return few_tiles if tiles <= FEW_TILES else many_tiles


def _word_product(level: Level, shape: Linear, words: WordDot, rows: int, tiles: int):
    """`_dot_product` by a product of words, which are unpacked for each tile anew, since that takes little time."""
    vectors, sums_of_row = tiles * rows * PANEL // level.lanes, words.planes * PANEL
    x_steps = -(-shape.k // WORD) * WORD // DOT
    add_block, fold = _word_sums(shape, words, rows), _fold(level, shape, 0, words.planes, 1)

    @T.inline
    def product(p, total, x, x_scales, x_sums, w, s, z):
        for i in T.serial(vectors):
            for v in T.vectorized(level.lanes):
                total[i * level.lanes + v] = T.float32(0)
        for b in T.serial(_blocks(shape)):
            sums = T.alloc_buffer((rows * sums_of_row,), "int32")
            for m in T.serial(tiles):
                add_block(x, m * x_steps, w, p, b, sums)
                for r in T.serial(rows):
                    fold(sums, r * sums_of_row, x_scales, x_sums, m * rows + r, s, z, p, b, total)

    return product


def word_offset(stored: Storage) -> int:
    """How far numbers from 0 to 15 are above their value, apart from zero points."""
    return WORD_ZERO if stored.offsets == "none" else 0


def _block(shape: Linear) -> int:
    """Steps of K that share an integer sum: a group of weights or of x, or BLOCK where x has one scale per row."""
    together = shape.weight.rounded_together(shape.k)
    return shape.weight.group_size or (together if together < shape.k else BLOCK)


def _blocks(shape: Linear) -> int:
    return -(-shape.k // _block(shape))


def _integer_row(level: Level, shape: Linear, planes: int):
    """Inline `round_row(x, row, gain, order, out, at, stride, scales, sums, i)`: round the x of row `row`.

    Step k goes to out[at + k // 4 * stride + k % 4], with K padded with zeros to whole words; of two planes, its higher
    part goes there and its lower part 4 further. scales[i, :] receives the scales of the groups, sums[i, :] the sums of
    the blocks.
    """
    k, block = shape.k, _block(shape)
    padded = -(-k // WORD) * WORD
    prepare, round_row = prepared_row(level, shape, as_floats=False), rounded_row(level, shape)

    @T.inline
    def integer_row(x, row, gain, order, out, at, stride, scales, sums, i):
        levels = T.alloc_buffer((padded,), "float32")
        prepare(x, row, gain, order, levels)
        round_row(levels, scales, i)
        for c in T.serial(padded - k):
            levels[k + c] = T.float32(0)
        for b in T.serial(_blocks(shape)):
            partial = T.alloc_buffer((WORD,), "int32")
            for v in T.vectorized(WORD):
                partial[v] = 0
            for c in T.serial(T.min(block, padded - b * block) // WORD):
                for v in T.vectorized(WORD):
                    partial[v] = partial[v] + T.Cast("int32", levels[b * block + c * WORD + v])
            sums[i, b] = 0
            for v in T.unroll(WORD):
                sums[i, b] = sums[i, b] + partial[v]
        for c in T.serial(padded // DOT):
            for j in T.vectorized(DOT):
                if planes == 1:
                    out[at + c * stride + j] = T.Cast(out.dtype, levels[c * DOT + j])
                else:
                    out[at + c * stride + j] = _higher(levels[c * DOT + j])
                    out[at + c * stride + DOT + j] = _lower(levels[c * DOT + j])

    return integer_row


def _higher(level: Expr) -> Expr:
    """The higher byte of a whole number of 16 bits, which is 256 times it plus the lower byte, from -128 to 127."""
    return T.Cast("int8", (T.Cast("int32", level) + 128) >> 8)


def _lower(level: Expr) -> Expr:
    return T.Cast("int8", T.Cast("int32", level) - ((T.Cast("int32", level) + 128) >> 8 << 8))


def _tile_product_from_memory(level: Level, shape: Linear, dot: Dot, rows: int):
    """Inline `multiply(x, x_step, fetches, w, p, b, count, sums)`: set sums to a tile of x times block b of panel p.

    sums is (R, planes, PANEL * partials); the tile of x begins at four steps of number `x_step`, and `count` is the
    number of steps of K, four at a time. Each weight is read into a register for all rows.
    """
    steps, block_steps, products = -(-shape.k // DOT), _block(shape) // DOT, rows * dot.planes
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


def _word_sums(shape: Linear, words: WordDot, rows: int):
    """Inline `add_block(x, x_step, w, p, b, sums)`: set sums (R, planes, PANEL) to group b of int4 panel p times x.

    The tile of x begins at four steps of number `x_step`.
    """
    per_row, per_group = shape.k // WORD, _block(shape) // WORD
    lanes, products, pairs = words.lanes, rows * words.planes, 2 * words.lanes
    run = next(n for n in (words.run, 2, 1) if per_group % n == 0 and per_row % n == 0)

    @T.inline
    def add_word(partial, numbers, x, step):
        for half in T.unroll(WORD // DOT):
            for r in T.unroll(products):
                partial[T.ramp(r * pairs, 1, pairs)] = words.add(
                    partial[T.ramp(r * pairs, 1, pairs)],
                    (numbers >> T.broadcast(4 * half, lanes)) & T.broadcast(T.int32(NIBBLES), lanes),
                    x,
                    ((step + half) * products + r) * DOT,
                )

    @T.inline
    def add_block(x, x_step, w, p, b, sums):
        flat = T.decl_buffer((-(-shape.n // PANEL) * per_row * PANEL,), "int32", data=w.data)
        for i in T.unroll(products * PANEL // lanes):
            sums[T.ramp(i * lanes, 1, lanes)] = T.broadcast(T.int32(0), lanes)
        for d in T.serial(T.min(per_group, per_row - b * per_group) // run):
            word = b * per_group + d * run
            at = (p * per_row + word) * PANEL
            for line in T.unroll(run * 4 * PANEL // LINE):
                prefetch(flat, at + (NEAR + line * LINE) // 4)
            for i in T.unroll(PANEL // lanes):
                partial = T.alloc_buffer((products * pairs,), "int16")
                for r in T.unroll(products):
                    partial[T.ramp(r * pairs, 1, pairs)] = T.broadcast(T.int16(0), pairs)
                for u in T.unroll(run):
                    add_word(
                        partial,
                        flat[T.ramp(at + u * PANEL + i * lanes, 1, lanes)],
                        x,
                        x_step + (word + u) * (WORD // DOT),
                    )
                for r in T.unroll(products):
                    sums[T.ramp(r * PANEL + i * lanes, 1, lanes)] = words.grow(
                        sums[T.ramp(r * PANEL + i * lanes, 1, lanes)], partial[T.ramp(r * pairs, 1, pairs)]
                    )

    return add_block


def _slab(shape: Linear, dot: Dot):
    """Inline `fill(w, p, b, count, slab)`: `count` * 4 steps of block b of panel p, as the dot keeps weights."""
    steps, block_steps = -(-shape.k // DOT), _block(shape) // DOT
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


def _tile_product(level: Level, dot: Dot, rows: int):
    """Inline `multiply(x, slab, x_step, count, sums)`: set sums (R, planes, PANEL * partials) to x times the slab.

    `count` is the number of steps of K, four at a time.
    """
    wide = max(level.tile.columns // level.lanes, 1)  # vectors of weights at a time
    vectors, products = STEP // dot.vector, rows * dot.planes
    clear_sums, store = _cleared(dot, rows, wide), _sums_stored(dot, rows, wide)

    @T.inline
    def multiply(x, slab, x_step, count, sums):
        for c in T.serial(vectors // wide):
            kept = T.alloc_buffer((products * wide * dot.lanes,), "int32")
            clear_sums(kept)
            for d in T.serial(count):
                for r in T.unroll(products):
                    for i in T.unroll(wide):
                        kept[T.ramp((r * wide + i) * dot.lanes, 1, dot.lanes)] = dot.add(
                            kept[T.ramp((r * wide + i) * dot.lanes, 1, dot.lanes)],
                            slab[T.ramp(d * STEP + (c * wide + i) * dot.vector, 1, dot.vector)],
                            x,
                            ((x_step + d) * products + r) * DOT,
                        )
            store(kept, sums, c)

    return multiply


def _fold(level: Level, shape: Linear, kept_above: int, planes: int, partials: int):
    """Inline `fold(sums, at, x_scales, x_sums, row, s, z, p, b, total)`: add a block's sums to total[row].

    The sums (planes, PANEL * partials) of the row begin at `at`; they are scaled, and total is (rows, PANEL).

    The part of a sum that is due to the offset or zero point of the weights is subtracted first; a minimum is added as
    often as the block's numbers of x say.
    """
    stored = shape.weight
    block, together = _block(shape), stored.rounded_together(shape.k)
    lanes, parts = level.lanes, PANEL // level.lanes
    offset = word_offset(stored) if format_of(stored).words else kept_above

    def plane(sums, first, column):
        at = first + column * partials
        return sums[at] if partials == 1 else sums[at] + sums[at + 1]

    def whole(sums, at, column):
        if planes == 1:
            return plane(sums, at, column)
        return (plane(sums, at, column) << 8) + plane(sums, at + PANEL * partials, column)

    def excess(x_sums, row, z, p, b, column):
        zero = T.int32(offset) if not stored.zero_points else T.Cast("int32", z[p, b, column]) + T.int32(offset)
        return x_sums[row, b] * zero

    def part(sums, at, x_scales, x_sums, row, s, z, p, b, column):
        x_scale = x_scales[row, b * block // together]
        total = T.Cast("float32", whole(sums, at, column) - excess(x_sums, row, z, p, b, column)) * x_scale
        if not stored.grouped:
            return total
        total = total * widened(s[p, b, column])
        if not stored.minimums:
            return total
        return total + T.Cast("float32", x_sums[row, b]) * x_scale * widened(z[p, b, column])

    @T.inline
    def fold(sums, at, x_scales, x_sums, row, s, z, p, b, total):
        for i in T.unroll(parts):
            for v in T.vectorized(lanes):
                total[row * PANEL + i * lanes + v] = total[row * PANEL + i * lanes + v] + part(
                    sums, at, x_scales, x_sums, row, s, z, p, b, i * lanes + v
                )

    return fold
