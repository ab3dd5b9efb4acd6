"""Products of int4 by dot products of whole words, which are unpacked anew for each tile of rows."""

from tvm.script import tirx as T

from build.kernels.cpu.dot import NIBBLES, WordDot
from build.kernels.cpu.integer_blocks import block_count, block_size, fold
from build.kernels.cpu.integer_row import padded_steps
from build.kernels.cpu.level import Level
from build.kernels.cpu.vector import LINE, NEAR, clear_memory, prefetch
from build.kernels.shapes import Linear
from runtime.artifact.layouts import DOT, PANEL, WORD

WORD_ROWS = 8  # rows, times planes of x, whose sums of a word stay in the 16 registers of AVX2


def word_product(level: Level, shape: Linear, words: WordDot, rows: int, tiles: int):
    """`dot_product` by a product of words, which are unpacked for each tile anew, since that takes little time."""
    vectors, sums_of_row = tiles * rows * PANEL // level.lanes, words.planes * PANEL
    x_steps = padded_steps(shape.k, DOT) // DOT
    add_block, add = _word_sums(shape, words, rows), fold(level, shape, 0, words.planes, 1)

    @T.inline
    def product(p, total, x, x_scales, x_sums, w, s, z):
        clear_memory(total, vectors, level.lanes)
        for b in T.serial(block_count(shape)):
            sums = T.alloc_buffer((rows * sums_of_row,), "int32")
            for m in T.serial(tiles):
                add_block(x, m * x_steps, w, p, b, sums)
                for r in T.serial(rows):
                    add(sums, r * sums_of_row, x_scales, x_sums, m * rows + r, s, z, p, b, total)

    return product


def _word_sums(shape: Linear, words: WordDot, rows: int):
    """Inline `add_block(x, x_step, w, p, b, sums)`: set sums (R, planes, PANEL) to group b of int4 panel p times x.

    The tile of x begins at four steps of number `x_step`.
    """
    per_row, per_group = shape.k // WORD, block_size(shape) // WORD
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
