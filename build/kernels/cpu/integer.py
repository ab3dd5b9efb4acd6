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
from build.kernels.cpu.level import Level
from build.kernels.cpu.panels import ITEMSIZE, output_scale
from build.kernels.cpu.row import prepared_row, rounded_row
from build.kernels.cpu.vector import AHEAD, LINE, NEAR, clear, prefetch, widened
from build.kernels.shapes import Linear
from export.weights.format import Storage
from export.weights.table import format_of
from runtime.artifact.layouts import DOT, PANEL, WORD, WORD_ZERO

BLOCK = 256  # steps of K whose sum stays an integer, where x has one scale per row
STEP = PANEL * DOT  # weights of a panel in four steps of K


def integer_gemv(level: Level, shape: Linear, dot: Dot, words: WordDot | None):
    """Body of `linear` for one row; int4 is multiplied by `words` if there is such a product."""
    direct = words if format_of(shape.weight).words else None
    n_blocks, planes = _blocks(shape), (direct or dot).planes
    padded = -(-shape.k // WORD) * WORD
    together = shape.weight.rounded_together(shape.k)
    panels = -(-shape.n_out // PANEL)
    lanes, parts = level.lanes, PANEL // level.lanes
    x_dtype, partials = ("int8", 1) if direct else (dot.x_dtype, dot.partials)
    add_block = _word_sums(shape, direct) if direct else _block_sums(shape, dot)
    round_row, fold = _integer_row(level, shape, planes), _fold(level, shape, dot.offset, planes, partials)
    scale_outputs = output_scale(level, shape)

    @T.inline
    def product(p, out, x, x_scales, x_sums, w, s, z):
        clear(out, parts, lanes)
        for b in T.serial(n_blocks):
            sums = T.alloc_buffer((planes * PANEL * partials,), "int32")
            add_block(x, w, p, b, sums)
            fold(sums, x_scales, x_sums, 0, s, z, p, b, out, 0)
        scale_outputs(out, 0, s, p)

    compute = panel_outputs(level, shape, 1, product)

    @T.inline
    def body(x_rows, gain, order, w, s, z, residual, y):
        x = T.alloc_buffer((padded * planes,), x_dtype)  # (K / 4, planes, 4)
        x_scales = T.alloc_buffer((1, shape.k // together), "float32")
        x_sums = T.alloc_buffer((1, n_blocks), "int32")
        round_row(x_rows, 0, gain, order, x, 0, DOT * planes, x_scales, x_sums, 0)
        for p in T.parallel(panels):
            compute(p, residual, y, x, x_scales, x_sums, w, s, z)

    return body


def integer_gemm(level: Level, shape: Linear, dot: Dot):
    """Body of `linear` for several rows: blocks of weights are unpacked once for all rows, as in `gemm`."""
    rows, k, planes = shape.rows, shape.k, dot.planes
    n_blocks, block_steps, together = _blocks(shape), _block(shape) // DOT, shape.weight.rounded_together(k)
    tile_rows = min(max(level.tile.rows // planes, 1), rows)
    tiles = -(-rows // tile_rows)
    panels = -(-shape.n_out // PANEL)
    x_steps, steps = -(-k // WORD) * WORD // DOT, -(-k // DOT)  # x is padded to whole words
    lanes, parts = level.lanes, PANEL // level.lanes
    fill, multiply = _slab(shape, dot), _tile_product(level, dot, tile_rows)
    round_row, fold = _integer_row(level, shape, planes), _fold(level, shape, dot.offset, planes, dot.partials)
    scale_outputs = output_scale(level, shape)
    row_sums_size = planes * PANEL * dot.partials

    @T.inline
    def product(p, total, x, x_scales, x_sums, w, s, z):
        slab = T.alloc_buffer((block_steps * STEP,), dot.slab_dtype)
        sums = T.alloc_buffer((tile_rows * row_sums_size,), "int32")
        for i in T.serial(tiles * tile_rows * parts):
            for v in T.vectorized(lanes):
                total[i * lanes + v] = T.float32(0)
        for b in T.serial(n_blocks):
            count = T.min(block_steps, steps - b * block_steps)
            fill(w, p, b, count, slab)
            for m in T.serial(tiles):
                multiply(x, slab, m * x_steps + b * block_steps, count, sums)
                for r in T.serial(tile_rows):
                    row_sums = T.decl_buffer((row_sums_size,), "int32", data=sums.data, elem_offset=r * row_sums_size)
                    fold(row_sums, x_scales, x_sums, m * tile_rows + r, s, z, p, b, total, (m * tile_rows + r) * PANEL)
        for m in T.serial(rows):
            scale_outputs(total, m * PANEL, s, p)

    compute = panel_outputs(level, shape, tiles * tile_rows, product)

    @T.inline
    def body(x_rows, gain, order, w, s, z, residual, y):
        x = T.alloc_buffer((tiles * x_steps * tile_rows * planes * DOT,), dot.x_dtype)  # (tiles, K / 4, R, planes, 4)
        x_scales = T.alloc_buffer((tiles * tile_rows, k // together), "float32")
        x_sums = T.alloc_buffer((tiles * tile_rows, n_blocks), "int32")
        for m in T.parallel(tiles):
            for r in T.serial(tile_rows):  # rows past the last repeat it and are not stored
                row = T.min(m * tile_rows + r, rows - 1)
                at = (m * x_steps * tile_rows + r) * DOT * planes
                stride = tile_rows * DOT * planes
                round_row(x_rows, row, gain, order, x, at, stride, x_scales, x_sums, m * tile_rows + r)
        for p in T.parallel(panels):
            compute(p, residual, y, x, x_scales, x_sums, w, s, z)

    return body


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


def _block_sums(shape: Linear, dot: Dot):
    """Inline `add_block(x, w, p, b, sums)`: set sums (planes, PANEL * partials) to block b of panel p times x."""
    steps, step_count = -(-shape.k // DOT), _block(shape) // DOT
    vectors, plane = STEP // dot.vector, PANEL * dot.partials
    each, (size, dtype, kept) = _steps_at_once(shape), _flat(shape, dot)
    step_size, ahead = size // (-(-shape.n // PANEL) * steps), NEAR // 4 if dtype == "int32" else AHEAD
    lines, per_line = each * step_size * ITEMSIZE[dtype] // LINE, LINE // ITEMSIZE[dtype]

    @T.inline
    def add_block(x, w, p, b, sums):
        flat = T.decl_buffer((size,), dtype, data=w.data)
        for i in T.unroll(dot.planes * vectors):
            sums[T.ramp(i * dot.lanes, 1, dot.lanes)] = T.broadcast(T.int32(0), dot.lanes)
        for d in T.serial(T.min(step_count, steps - b * step_count) // each):
            at = (p * steps + b * step_count + d * each) * step_size
            for line in T.unroll(lines):
                prefetch(flat, at + ahead + line * per_line)
            for i in T.unroll(vectors):
                for part in T.unroll(each):
                    for h in T.unroll(dot.planes):
                        sums[T.ramp(h * plane + i * dot.lanes, 1, dot.lanes)] = dot.add(
                            sums[T.ramp(h * plane + i * dot.lanes, 1, dot.lanes)],
                            kept(flat, at, i, part),
                            x,
                            ((b * step_count + d * each + part) * dot.planes + h) * DOT,
                        )

    return add_block


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


def _word_sums(shape: Linear, words: WordDot):
    """Inline `add_block(x, w, p, b, sums)`: set sums (planes, PANEL) to group b of int4 panel p times x."""
    per_row, per_group = shape.k // WORD, _block(shape) // WORD
    lanes, planes, pairs = words.lanes, words.planes, 2 * words.lanes
    run = next(n for n in (words.run, 2, 1) if per_group % n == 0 and per_row % n == 0)

    @T.inline
    def add_word(partial, numbers, x, step):
        for half in T.unroll(WORD // DOT):
            for h in T.unroll(planes):
                partial[T.ramp(h * pairs, 1, pairs)] = words.add(
                    partial[T.ramp(h * pairs, 1, pairs)],
                    (numbers >> T.broadcast(4 * half, lanes)) & T.broadcast(T.int32(NIBBLES), lanes),
                    x,
                    ((step + half) * planes + h) * DOT,
                )

    @T.inline
    def add_block(x, w, p, b, sums):
        flat = T.decl_buffer((-(-shape.n // PANEL) * per_row * PANEL,), "int32", data=w.data)
        for i in T.unroll(planes * PANEL // lanes):
            sums[T.ramp(i * lanes, 1, lanes)] = T.broadcast(T.int32(0), lanes)
        for d in T.serial(T.min(per_group, per_row - b * per_group) // run):
            word = b * per_group + d * run
            at = (p * per_row + word) * PANEL
            for line in T.unroll(run * 4 * PANEL // LINE):
                prefetch(flat, at + (NEAR + line * LINE) // 4)
            for i in T.unroll(PANEL // lanes):
                partial = T.alloc_buffer((planes * pairs,), "int16")
                for h in T.unroll(planes):
                    partial[T.ramp(h * pairs, 1, pairs)] = T.broadcast(T.int16(0), pairs)
                for u in T.unroll(run):
                    add_word(partial, flat[T.ramp(at + u * PANEL + i * lanes, 1, lanes)], x, (word + u) * (WORD // DOT))
                for h in T.unroll(planes):
                    sums[T.ramp(h * PANEL + i * lanes, 1, lanes)] = words.grow(
                        sums[T.ramp(h * PANEL + i * lanes, 1, lanes)], partial[T.ramp(h * pairs, 1, pairs)]
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


def _tile_product(level: Level, dot: Dot, tile_rows: int):
    """Inline `multiply(x, slab, x_step, count, sums)`: set sums (R, planes, PANEL * partials) to x times the slab.

    `count` is the number of steps of K, four at a time.
    """
    wide = max(level.tile.columns // level.lanes, 1)  # vectors of weights at a time
    vectors, planes = STEP // dot.vector, dot.planes
    plane = PANEL * dot.partials

    @T.inline
    def multiply(x, slab, x_step, count, sums):
        for c in T.serial(vectors // wide):
            kept = T.alloc_buffer((tile_rows * planes * wide * dot.lanes,), "int32")
            for i in T.unroll(tile_rows * planes * wide):
                kept[T.ramp(i * dot.lanes, 1, dot.lanes)] = T.broadcast(T.int32(0), dot.lanes)
            for d in T.serial(count):
                for r in T.unroll(tile_rows * planes):
                    for i in T.unroll(wide):
                        kept[T.ramp((r * wide + i) * dot.lanes, 1, dot.lanes)] = dot.add(
                            kept[T.ramp((r * wide + i) * dot.lanes, 1, dot.lanes)],
                            slab[T.ramp(d * STEP + (c * wide + i) * dot.vector, 1, dot.vector)],
                            x,
                            ((x_step + d) * tile_rows * planes + r) * DOT,
                        )
            for r in T.unroll(tile_rows * planes):
                for i in T.unroll(wide):
                    sums[T.ramp(r * plane + (c * wide + i) * dot.lanes, 1, dot.lanes)] = kept[
                        T.ramp((r * wide + i) * dot.lanes, 1, dot.lanes)
                    ]

    return multiply


def _fold(level: Level, shape: Linear, kept_above: int, planes: int, partials: int):
    """Inline `fold(sums, x_scales, x_sums, row, s, z, p, b, out, at)`: add a block's sums, scaled, to out[at :].

    The part of a sum that is due to the offset or zero point of the weights is subtracted first; a minimum is added as
    often as the block's numbers of x say.
    """
    stored = shape.weight
    block, together = _block(shape), stored.rounded_together(shape.k)
    lanes, parts = level.lanes, PANEL // level.lanes
    offset = word_offset(stored) if format_of(stored).words else kept_above

    def plane(sums, h, column):
        at = h * PANEL * partials + column * partials
        return sums[at] if partials == 1 else sums[at] + sums[at + 1]

    def whole(sums, column):
        return plane(sums, 0, column) if planes == 1 else (plane(sums, 0, column) << 8) + plane(sums, 1, column)

    def excess(x_sums, row, z, p, b, column):
        zero = T.int32(offset) if not stored.zero_points else T.Cast("int32", z[p, b, column]) + T.int32(offset)
        return x_sums[row, b] * zero

    def part(sums, x_scales, x_sums, row, s, z, p, b, column):
        x_scale = x_scales[row, b * block // together]
        total = T.Cast("float32", whole(sums, column) - excess(x_sums, row, z, p, b, column)) * x_scale
        if not stored.grouped:
            return total
        total = total * widened(s[p, b, column])
        if not stored.minimums:
            return total
        return total + T.Cast("float32", x_sums[row, b]) * x_scale * widened(z[p, b, column])

    @T.inline
    def fold(sums, x_scales, x_sums, row, s, z, p, b, out, at):
        for i in T.unroll(parts):
            for v in T.vectorized(lanes):
                out[at + i * lanes + v] = out[at + i * lanes + v] + part(
                    sums, x_scales, x_sums, row, s, z, p, b, i * lanes + v
                )

    return fold
