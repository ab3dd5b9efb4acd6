"""One step of attention over some columns with a running softmax: the building block of all CPU attention kernels."""

from operator import add

from tvm.script import tirx as T

from build.kernels.cpu.attention.columns import HIDDEN, WIDTH, position_of, sees_all
from build.kernels.cpu.attention.products import products
from build.kernels.cpu.level import Level, fitting_lanes
from build.kernels.cpu.vector import exp, reduced
from build.kernels.shapes import RollingAttention
from runtime.artifact.caches import RING_BLOCK


def attention_step(level: Level, shape: RollingAttention, R: int):
    """Inline `attend(queries, tile, columns, column, count, softmax)`: attend over `count` columns, R rows.

    The columns begin at `column`, and there are at most WIDTH of them. Whole blocks of keys are read, but no value of
    floats past the last column.
    """
    D = shape.head_dim
    score, mix = products(level, shape, R)
    hide, soften, sees = _hiding(level, shape, R), _softening(level, R), sees_all(shape, R)

    @T.inline
    def attend(queries, tile, columns, column, count, softmax):
        scores = T.alloc_buffer((R * WIDTH,), "float32")
        shrink = T.alloc_buffer((R,), "float32")
        blocks = (count + RING_BLOCK - 1) // RING_BLOCK
        score(queries, tile, columns.keys, columns.start + column, blocks, scores)
        if not sees(columns, column, blocks * RING_BLOCK, softmax):
            hide(scores, columns, column, blocks * RING_BLOCK, softmax)
        soften(scores, blocks * RING_BLOCK, softmax, shrink)
        mix(scores, columns.values, columns.start + column, count, softmax.mixed, softmax.at * D, shrink)

    return attend


def _hiding(level: Level, shape: RollingAttention, R: int):
    """Inline `hide(scores, columns, column, count, softmax)`: give HIDDEN to scores (R, WIDTH) of columns not seen."""
    lanes = fitting_lanes(level, RING_BLOCK)

    def seen(columns, c, low, high):
        return T.And(position_of(shape, columns, c) >= low, position_of(shape, columns, c) <= high)

    @T.inline
    def hide(scores, columns, column, count, softmax):
        for r in T.serial(R):
            for n in T.serial(count // lanes):
                for v in T.vectorized(lanes):
                    scores[r * WIDTH + n * lanes + v] = T.Select(
                        seen(columns, column + n * lanes + v, softmax.oldest[r], softmax.newest[r]),
                        scores[r * WIDTH + n * lanes + v],
                        T.float32(HIDDEN),
                    )

    return hide


def _softening(level: Level, R: int):
    """Inline `soften(scores, count, softmax, shrink)`: from scores (R, WIDTH) to shares.

    Each score becomes exp(score - largest so far), or zero if it is HIDDEN, and the values mixed so far must be
    multiplied by shrink[r]. `count` is of columns in whole blocks.
    """
    lanes = fitting_lanes(level, RING_BLOCK)

    @T.inline
    def soften(scores, count, softmax, shrink):
        top = T.alloc_buffer((R,), "float32")
        for r in T.serial(R):
            peak = T.alloc_buffer((lanes,), "float32")
            for v in T.vectorized(lanes):
                peak[v] = softmax.largest[softmax.at + r]
            for n in T.serial(count // lanes):
                for v in T.vectorized(lanes):
                    peak[v] = T.max(peak[v], scores[r * WIDTH + n * lanes + v])
            top[r] = reduced(peak, lanes, T.max)
        for r in T.vectorized(R):
            shrink[r] = exp(softmax.largest[softmax.at + r] - top[r])
            softmax.largest[softmax.at + r] = top[r]
        for r in T.serial(R):
            total = T.alloc_buffer((lanes,), "float32")
            for v in T.vectorized(lanes):
                total[v] = T.float32(0)
            for n in T.serial(count // lanes):
                for v in T.vectorized(lanes):
                    scores[r * WIDTH + n * lanes + v] = T.Select(
                        scores[r * WIDTH + n * lanes + v] > T.float32(HIDDEN),
                        exp(scores[r * WIDTH + n * lanes + v] - top[r]),
                        T.float32(0),
                    )
                    total[v] = total[v] + scores[r * WIDTH + n * lanes + v]
            softmax.total[softmax.at + r] = softmax.total[softmax.at + r] * shrink[r] + reduced(total, lanes, add)

    return soften
