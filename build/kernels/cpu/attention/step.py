"""One step of attention over some columns with a running softmax: the building block of all CPU attention kernels."""

from tvm.script import tirx as T

from build.kernels.cpu.attention.columns import HIDDEN, WIDTH, position_of, sees_all
from build.kernels.cpu.attention.products import products
from build.kernels.cpu.level import Level, fitting_lanes
from build.kernels.cpu.vector import exp, reduction
from build.kernels.shapes import RollingAttention
from runtime.artifact.caches import RING_BLOCK


def attention_step(level: Level, shape: RollingAttention, R: int):
    """Inline `attend(queries, tile, columns, column, count, softmax)`: attend over `count` columns for one tile of R rows.

    The columns begin at `column`, and there are at most WIDTH of them. Whole blocks of keys are read, but no value of
    floats past the last column.
    """
    D = shape.head_dim
    score, mix = products(level, shape, R)
    soften, sees = _softening(level, shape), sees_all(shape, R)

    @T.inline
    def attend(queries, tile, columns, column, count, softmax):
        scores = T.alloc_buffer((R * WIDTH,), "float32")
        shrink = T.alloc_buffer((R,), "float32")
        blocks = (count + RING_BLOCK - 1) // RING_BLOCK
        score(queries, tile, columns.keys, columns.start + column, blocks, scores)
        if sees(columns, column, blocks * RING_BLOCK, softmax):
            for r in T.serial(R):
                soften(scores, r, columns, column, blocks * RING_BLOCK, softmax, shrink, False)
        else:
            for r in T.serial(R):
                soften(scores, r, columns, column, blocks * RING_BLOCK, softmax, shrink, True)
        mix(scores, columns.values, columns.start + column, count, softmax.mixed, softmax.at * D, shrink)

    return attend


def _softening(level: Level, shape: RollingAttention):
    """Inline `soften(scores, r, columns, column, count, softmax, shrink, hides)`: from scores to shares of row r.

    Each score of scores (R, WIDTH) becomes exp(score - largest so far), or zero where the column is hidden, and
    the values mixed so far must be multiplied by shrink[r]. `count` is of whole blocks. `hides`, a Python bool, says
    whether there may be columns that the row does not see.
    """
    lanes = fitting_lanes(level, RING_BLOCK)
    fold_max, fold_sum = reduction(lanes, T.max), reduction(lanes, lambda a, b: a + b)

    def seen(columns, c, low, high):
        return T.And(position_of(shape, columns, c) >= low, position_of(shape, columns, c) <= high)

    @T.inline
    def soften(scores, r, columns, column, count, softmax, shrink, hides):
        peak = T.alloc_buffer((lanes,), "float32")
        total = T.alloc_buffer((lanes,), "float32")
        for v in T.vectorized(lanes):
            peak[v] = softmax.largest[softmax.at + r]
        for n in T.serial(count // lanes):
            if hides:
                for v in T.vectorized(lanes):
                    scores[r * WIDTH + n * lanes + v] = T.Select(
                        seen(columns, column + n * lanes + v, softmax.oldest[r], softmax.newest[r]),
                        scores[r * WIDTH + n * lanes + v],
                        T.float32(HIDDEN),
                    )
            for v in T.vectorized(lanes):
                peak[v] = T.max(peak[v], scores[r * WIDTH + n * lanes + v])
        fold_max(peak)
        shrink[r] = exp(softmax.largest[softmax.at + r] - peak[0])
        softmax.largest[softmax.at + r] = peak[0]
        for v in T.vectorized(lanes):
            total[v] = T.float32(0)
        for n in T.serial(count // lanes):
            for v in T.vectorized(lanes):
                if hides:
                    scores[r * WIDTH + n * lanes + v] = T.Select(
                        scores[r * WIDTH + n * lanes + v] > T.float32(HIDDEN),
                        exp(scores[r * WIDTH + n * lanes + v] - peak[0]),
                        T.float32(0),
                    )
                else:
                    scores[r * WIDTH + n * lanes + v] = exp(scores[r * WIDTH + n * lanes + v] - peak[0])
            for v in T.vectorized(lanes):
                total[v] = total[v] + scores[r * WIDTH + n * lanes + v]
        fold_sum(total)
        softmax.total[softmax.at + r] = softmax.total[softmax.at + r] * shrink[r] + total[0]

    return soften
