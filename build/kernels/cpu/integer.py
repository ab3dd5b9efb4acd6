"""Products with int8 activations: adjacent numbers of a token's x share a scale, and sums within a group are integers.

x = q s with s = max |x| / 127 and q = round(x / s), exactly as in the ONNX graph. y is the sum, over the groups of K,
of s times the sum of q w, times the weight's scale, which for int4 is that of the group. Sums over a block of K are
integers, and small enough to be exact in float32 too. Several rows of int4 are left to `gemm`, which rounds x and
multiplies in float32: converting each group's integer sums costs more than it saves.
"""

from tvm.script import tirx as T

from build.kernels.cpu.dot import Dot, WordDot
from build.kernels.cpu.epilogue import panel_outputs
from build.kernels.cpu.level import Level
from build.kernels.cpu.panels import output_scale
from build.kernels.cpu.row import prepared_row, rounded_row
from build.kernels.cpu.vector import AHEAD, LINE, NEAR, clear, prefetch, widened
from build.kernels.shapes import Linear
from export.weights.table import format_of
from runtime.artifact.layouts import DOT, PANEL, WORD, WORD_ZERO

BLOCK = 256  # steps of K whose sum stays an integer: 256 * 127 * 127 < 2**24
STEP = PANEL * DOT  # weights of a panel in four steps of K


def integer_gemv(level: Level, shape: Linear, dot: Dot, words: WordDot):
    """Body of `linear` for one row."""
    n_blocks, padded = _blocks(shape), -(-shape.k // WORD) * WORD
    together = shape.weight.rounded_together(shape.k)
    panels = -(-shape.n_out // PANEL)
    lanes, parts = level.lanes, PANEL // level.lanes
    words_packed = format_of(shape.weight).words
    x_dtype, partials, offset = ("int8", 1, WORD_ZERO) if words_packed else (dot.x_dtype, dot.partials, dot.offset)
    add_block = _word_sums(shape, words) if words_packed else _byte_sums(shape, dot)
    round_row, fold = _integer_row(level, shape), _fold(level, shape, partials, offset)
    scale_outputs = output_scale(level, shape)

    @T.inline
    def product(p, out, x, x_scales, x_sums, w, s, z):
        clear(out, parts, lanes)
        for b in T.serial(n_blocks):
            sums = T.alloc_buffer((PANEL * partials,), "int32")
            add_block(x, w, p, b, sums)
            fold(sums, x_scales, x_sums, 0, s, z, p, b, out, 0)
        scale_outputs(out, 0, s, p)

    compute = panel_outputs(level, shape, 1, product)

    @T.inline
    def body(x_rows, gain, w, s, z, residual, y):
        x = T.alloc_buffer((padded,), x_dtype)
        x_scales = T.alloc_buffer((1, shape.k // together), "float32")
        x_sums = T.alloc_buffer((1, n_blocks), "int32")
        round_row(x_rows, 0, gain, x, 0, DOT, x_scales, x_sums, 0)
        for p in T.parallel(panels):
            compute(p, residual, y, x, x_scales, x_sums, w, s, z)

    return body


def integer_gemm(level: Level, shape: Linear, dot: Dot):
    """Body of `linear` for several rows of int8: blocks of weights are widened once for all rows, as in `gemm`."""
    rows, k = shape.rows, shape.k
    n_blocks, block_steps, together = _blocks(shape), _block(shape) // DOT, shape.weight.rounded_together(k)
    tile_rows = min(level.tile.rows, rows)
    tiles = -(-rows // tile_rows)
    panels = -(-shape.n_out // PANEL)
    x_steps, steps = -(-k // WORD) * WORD // DOT, -(-k // DOT)  # x is padded to whole words
    lanes, parts = level.lanes, PANEL // level.lanes
    fill, multiply = _slab(shape, dot), _tile_product(level, dot, tile_rows)
    round_row, fold = _integer_row(level, shape), _fold(level, shape, dot.partials, dot.offset)
    scale_outputs = output_scale(level, shape)

    @T.inline
    def product(p, total, x, x_scales, x_sums, w, s, z):
        slab = T.alloc_buffer((block_steps * STEP,), dot.slab_dtype)
        sums = T.alloc_buffer((tile_rows * PANEL * dot.partials,), "int32")
        for i in T.serial(tiles * tile_rows * parts):
            for v in T.vectorized(lanes):
                total[i * lanes + v] = T.float32(0)
        for b in T.serial(n_blocks):
            count = T.min(block_steps, steps - b * block_steps)
            fill(w, p, b, count, slab)
            for m in T.serial(tiles):
                multiply(x, slab, m * x_steps + b * block_steps, count, sums)
                for r in T.serial(tile_rows):
                    row_sums = T.decl_buffer(
                        (PANEL * dot.partials,), "int32", data=sums.data, elem_offset=r * PANEL * dot.partials
                    )
                    fold(row_sums, x_scales, x_sums, m * tile_rows + r, s, z, p, b, total, (m * tile_rows + r) * PANEL)
        for m in T.serial(rows):
            scale_outputs(total, m * PANEL, s, p)

    compute = panel_outputs(level, shape, tiles * tile_rows, product)

    @T.inline
    def body(x_rows, gain, w, s, z, residual, y):
        x = T.alloc_buffer((tiles * x_steps * tile_rows * DOT,), dot.x_dtype)  # (tiles, K / 4, R, 4)
        x_scales = T.alloc_buffer((tiles * tile_rows, k // together), "float32")
        x_sums = T.alloc_buffer((tiles * tile_rows, n_blocks), "int32")
        for m in T.parallel(tiles):
            for r in T.serial(tile_rows):  # rows past the last repeat it and are not stored
                row = T.min(m * tile_rows + r, rows - 1)
                at = (m * x_steps * tile_rows + r) * DOT
                round_row(x_rows, row, gain, x, at, tile_rows * DOT, x_scales, x_sums, m * tile_rows + r)
        for p in T.parallel(panels):
            compute(p, residual, y, x, x_scales, x_sums, w, s, z)

    return body


def _block(shape: Linear) -> int:
    """Steps of K that share an integer sum: a group of weights or of x, or BLOCK where x has one scale per row."""
    together = shape.weight.rounded_together(shape.k)
    return shape.weight.group_size or (together if together < shape.k else BLOCK)


def _blocks(shape: Linear) -> int:
    return -(-shape.k // _block(shape))


def _integer_row(level: Level, shape: Linear):
    """Inline `round_row(x, row, gain, out, at, stride, scales, sums, i)`: round the x of row `row` to int8.

    Step k goes to out[at + k // 4 * stride + k % 4], with K padded with zeros to whole words. scales[i, :] receives
    the scales of the groups, sums[i, :] the sums of the blocks.
    """
    k, block = shape.k, _block(shape)
    padded = -(-k // WORD) * WORD
    prepare, round_row = prepared_row(level, shape), rounded_row(level, shape)

    @T.inline
    def integer_row(x, row, gain, out, at, stride, scales, sums, i):
        levels = T.alloc_buffer((padded,), "float32")
        prepare(x, row, gain, levels)
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
                out[at + c * stride + j] = T.Cast(out.dtype, levels[c * DOT + j])

    return integer_row


def _byte_sums(shape: Linear, dot: Dot):
    """Inline `add_block(x, w, p, b, sums)`: set sums to block b of int8 panel p times x."""
    steps, step_count = -(-shape.k // DOT), _block(shape) // DOT
    vectors = STEP // dot.vector

    @T.inline
    def add_block(x, w, p, b, sums):
        flat = T.decl_buffer((-(-shape.n // PANEL) * steps * STEP,), "int8", data=w.data)
        for i in T.unroll(vectors):
            sums[T.ramp(i * dot.lanes, 1, dot.lanes)] = T.broadcast(T.int32(0), dot.lanes)
        for d in T.serial(T.min(step_count, steps - b * step_count)):
            at = (p * steps + b * step_count + d) * STEP
            for line in T.unroll(STEP // LINE):
                prefetch(flat, at + AHEAD + line * LINE)
            for i in T.unroll(vectors):
                sums[T.ramp(i * dot.lanes, 1, dot.lanes)] = dot.add(
                    sums[T.ramp(i * dot.lanes, 1, dot.lanes)],
                    dot.widened(flat[T.ramp(at + i * dot.vector, 1, dot.vector)], dot.vector),
                    x,
                    (b * step_count + d) * DOT,
                )

    return add_block


def _word_sums(shape: Linear, words: WordDot):
    """Inline `add_block(x, w, p, b, sums)`: set sums to group b of int4 panel p times x.

    Zero points are not yet subtracted.
    """
    per_row, per_group = shape.k // WORD, _block(shape) // WORD
    lanes = words.lanes

    @T.inline
    def add_block(x, w, p, b, sums):
        flat = T.decl_buffer((-(-shape.n // PANEL) * per_row * PANEL,), "int32", data=w.data)
        for i in T.unroll(PANEL // lanes):
            sums[T.ramp(i * lanes, 1, lanes)] = T.broadcast(T.int32(0), lanes)
        for d in T.serial(T.min(per_group, per_row - b * per_group)):
            at = (p * per_row + b * per_group + d) * PANEL
            for line in T.unroll(4 * PANEL // LINE):
                prefetch(flat, at + (NEAR + line * LINE) // 4)
            for i in T.unroll(PANEL // lanes):
                sums[T.ramp(i * lanes, 1, lanes)] = words.add(
                    sums[T.ramp(i * lanes, 1, lanes)],
                    flat[T.ramp(at + i * lanes, 1, lanes)],
                    x,
                    (b * per_group + d) * WORD,
                )

    return add_block


def _slab(shape: Linear, dot: Dot):
    """Inline `fill(w, p, b, count, slab)`: `count` * 4 steps of block b of int8 panel p, as the dot keeps weights."""
    steps, block_steps = -(-shape.k // DOT), _block(shape) // DOT
    vectors, vector = STEP // dot.vector, dot.vector

    @T.inline
    def fill(w, p, b, count, slab):
        flat = T.decl_buffer((-(-shape.n // PANEL) * steps * STEP,), "int8", data=w.data)
        for d in T.serial(count):
            for i in T.unroll(vectors):
                slab[T.ramp(d * STEP + i * vector, 1, vector)] = dot.widened(
                    flat[T.ramp((p * steps + b * block_steps + d) * STEP + i * vector, 1, vector)], vector
                )

    return fill


def _tile_product(level: Level, dot: Dot, tile_rows: int):
    """Inline `multiply(x, slab, x_step, count, sums)`: set sums (R, PANEL * partials) to a tile of x times the slab.

    `count` is the number of steps of K, four at a time.
    """
    wide = max(level.tile.columns // level.lanes, 1)  # vectors of weights at a time
    vectors = STEP // dot.vector
    row = PANEL * dot.partials

    @T.inline
    def multiply(x, slab, x_step, count, sums):
        for c in T.serial(vectors // wide):
            kept = T.alloc_buffer((tile_rows * wide * dot.lanes,), "int32")
            for i in T.unroll(tile_rows * wide):
                kept[T.ramp(i * dot.lanes, 1, dot.lanes)] = T.broadcast(T.int32(0), dot.lanes)
            for d in T.serial(count):
                for r in T.unroll(tile_rows):
                    for i in T.unroll(wide):
                        kept[T.ramp((r * wide + i) * dot.lanes, 1, dot.lanes)] = dot.add(
                            kept[T.ramp((r * wide + i) * dot.lanes, 1, dot.lanes)],
                            slab[T.ramp(d * STEP + (c * wide + i) * dot.vector, 1, dot.vector)],
                            x,
                            ((x_step + d) * tile_rows + r) * DOT,
                        )
            for r in T.unroll(tile_rows):
                for i in T.unroll(wide):
                    sums[T.ramp(r * row + (c * wide + i) * dot.lanes, 1, dot.lanes)] = kept[
                        T.ramp((r * wide + i) * dot.lanes, 1, dot.lanes)
                    ]

    return multiply


def _fold(level: Level, shape: Linear, partials: int, offset: int):
    """Inline `fold(sums, x_scales, x_sums, row, s, z, p, b, out, at)`: add a block's sums, scaled, to out[at :].

    The part of a sum that is due to the offset or zero point of the weights is subtracted first.
    """
    block, together = _block(shape), shape.weight.rounded_together(shape.k)
    lanes, parts = level.lanes, PANEL // level.lanes

    def value(sums, column):
        return sums[column] if partials == 1 else sums[2 * column] + sums[2 * column + 1]

    def excess(x_sums, row, z, p, b, column):
        if shape.weight.zero_points:
            return x_sums[row, b] * T.Cast("int32", z[p, b, column])
        return x_sums[row, b] * T.int32(offset)

    def scaled(sums, x_scales, x_sums, row, z, p, b, column):
        whole = value(sums, column) - excess(x_sums, row, z, p, b, column)
        return T.Cast("float32", whole) * x_scales[row, b * block // together]

    @T.inline
    def fold(sums, x_scales, x_sums, row, s, z, p, b, out, at):
        for i in T.unroll(parts):
            for v in T.vectorized(lanes):
                if shape.weight.group_size is None:
                    out[at + i * lanes + v] = out[at + i * lanes + v] + scaled(
                        sums, x_scales, x_sums, row, z, p, b, i * lanes + v
                    )
                else:
                    out[at + i * lanes + v] = out[at + i * lanes + v] + scaled(
                        sums, x_scales, x_sums, row, z, p, b, i * lanes + v
                    ) * widened(s[p, b, i * lanes + v])

    return fold
