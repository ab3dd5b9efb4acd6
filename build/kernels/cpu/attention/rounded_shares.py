"""Shares rounded to whole numbers, `SHARE_LEVELS` to a row's largest of a step, for products with int8 and int4.

What a column adds to a mixed value is off by half of 1 / SHARE_LEVELS of what the row's largest share adds, at most.
The sum itself is exact.
"""

from tvm.ir import Expr
from tvm.script import tirx as T

from build.kernels.cpu.attention.columns import WIDTH
from build.kernels.cpu.level import Level, fitting_lanes
from build.kernels.cpu.vector import reduced
from export.static_model.constants import SMALLEST_PEAK
from runtime.artifact.caches import RING_BLOCK
from runtime.artifact.schemes import ROUNDING_LEVELS

SHARE_LEVELS = ROUNDING_LEVELS["int16"]


def times(share: Expr, number: Expr) -> Expr:
    """A share times a column's scale or minimum, and zero if the share is: a column that is hidden may hold NaN."""
    return T.Select(share > T.float32(0), share * number, T.float32(0))


def share_rounding(level: Level, R: int):
    """Inline `round_shares(share, whole, steps, count)`: set whole (R, WIDTH), int16, to shares in levels of steps[r].

    share(r, column) is a Python function; none of the shares is negative. `count` is of columns in whole blocks.
    """
    lanes = fitting_lanes(level, RING_BLOCK)

    @T.inline
    def round_shares(share, whole, steps, count):
        scaled = T.alloc_buffer((R * WIDTH,), "float32")
        factor = T.alloc_buffer((R,), "float32")
        for r in T.serial(R):
            peak = T.alloc_buffer((lanes,), "float32")
            for v in T.vectorized(lanes):
                peak[v] = T.float32(SMALLEST_PEAK)
            for n in T.serial(count // lanes):
                for v in T.vectorized(lanes):
                    scaled[r * WIDTH + n * lanes + v] = share(r, n * lanes + v)
                    peak[v] = T.max(peak[v], scaled[r * WIDTH + n * lanes + v])
            steps[r] = reduced(peak, lanes, T.max)
        for r in T.vectorized(R):
            factor[r] = T.float32(SHARE_LEVELS) / steps[r]
            steps[r] = steps[r] / T.float32(SHARE_LEVELS)
        for r in T.serial(R):
            for n in T.serial(count // lanes):
                for v in T.vectorized(lanes):
                    whole[r * WIDTH + n * lanes + v] = T.Cast(
                        "int16", T.nearbyint(scaled[r * WIDTH + n * lanes + v] * factor[r])
                    )

    return round_shares
