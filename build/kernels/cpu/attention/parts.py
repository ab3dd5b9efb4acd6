"""The parts of a ring, each of which is summed by itself, and their sum.

Where the borders of parts lie depends on nothing but the ring, and the order of the sum on nothing at all.
"""

from tvm.ir import Expr
from tvm.script import tirx as T

from build.kernels.cpu.attention.columns import HIDDEN, WIDTH, may_see
from build.kernels.cpu.attention.step import attention_step
from build.kernels.cpu.level import Level, fitting_lanes
from build.kernels.cpu.vector import exp
from build.kernels.shapes import RollingAttention

# Parts of a ring, which tasks share where a row has one token: enough to keep all threads busy where heads do not
# divide evenly.
SPLITS = 8
SMALLEST_TOTAL = 1e-30  # of shares: the output of a row that sees nothing is zero


def parts_of(shape: RollingAttention) -> tuple[int, int]:
    """How many parts a ring is divided into, and the steps of each."""
    steps = -(-shape.ring_len // WIDTH)
    share = -(-steps // min(SPLITS, steps))
    return -(-steps // share), share


def parts_used(shape: RollingAttention, end: Expr) -> Expr:
    """How many parts hold columns, once the ring holds or has held `end` positions."""
    columns = parts_of(shape)[1] * WIDTH
    return (T.min(end, shape.ring_len) + columns - 1) // columns


def part_attention(level: Level, shape: RollingAttention, R: int):
    """Inline `attend(queries, tile, columns, part, used, softmax)`: attend over a part of the ring, R rows.

    Only the first `used` columns of the ring have ever been written.
    """
    _, share = parts_of(shape)
    attend_step, sees = attention_step(level, shape, R), may_see(shape, R)

    @T.inline
    def attend(queries, tile, columns, part, used, softmax):
        for step in T.serial(share):
            column = (part * share + step) * WIDTH
            if column < used:
                count = T.min(WIDTH, used - column)
                if sees(columns, column, count, softmax):
                    attend_step(queries, tile, columns, column, count, softmax)

    return attend


def state_clearer(level: Level, R: int, D: int):
    """Inline `clear(largest, total, mixed, i)`: the state of R rows that have seen nothing yet, as the i-th."""
    lanes = fitting_lanes(level, D)

    @T.inline
    def clear(largest, total, mixed, i):
        for r in T.unroll(R):
            largest[i * R + r] = T.float32(HIDDEN)
            total[i * R + r] = T.float32(0)
        for c in T.serial(R * D // lanes):
            for v in T.vectorized(lanes):
                mixed[i * R * D + c * lanes + v] = T.float32(0)

    return clear


def parts_joined(level: Level, shape: RollingAttention, R: int):
    """Inline `join(largest, total, mixed, first, parts, r, out, at)`: set a head's output to the sum of its parts.

    They are the states of row r that begin with number `first`; the output's head_dim numbers begin at `at`.
    """
    D, lanes = shape.head_dim, fitting_lanes(level, shape.head_dim)

    @T.inline
    def join(largest, total, mixed, first, parts, r, out, at):
        flat_out = T.decl_buffer((shape.rows * shape.tokens * shape.n_heads * D,), "float32", data=out.data)
        joined = T.alloc_buffer((2,), "float32")  # the largest score, then the sum of all totals
        joined[0] = T.float32(HIDDEN)
        joined[1] = T.float32(0)
        for s in T.serial(parts):
            joined[0] = T.max(joined[0], largest[(first + s) * R + r])
        for s in T.serial(parts):
            largest[(first + s) * R + r] = exp(largest[(first + s) * R + r] - joined[0])
            joined[1] = joined[1] + largest[(first + s) * R + r] * total[(first + s) * R + r]
        joined[1] = T.float32(1) / T.max(joined[1], T.float32(SMALLEST_TOTAL))
        for c in T.serial(D // lanes):
            sums = T.alloc_buffer((lanes,), "float32")
            for v in T.vectorized(lanes):
                sums[v] = T.float32(0)
            for s in T.serial(parts):
                for v in T.vectorized(lanes):
                    sums[v] = (
                        sums[v]
                        + largest[(first + s) * R + r] * joined[1] * mixed[((first + s) * R + r) * D + c * lanes + v]
                    )
            for v in T.vectorized(lanes):
                flat_out[at + c * lanes + v] = sums[v]

    return join
