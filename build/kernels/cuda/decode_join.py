"""The last launch of `decode_attention.py`: the shares' results become the heads' outputs."""

from tvm.script import tirx as T

from build.kernels.cuda.binding import WARP, Binding
from build.kernels.cuda.decode_shares import heads_of_block, splits, visible
from build.kernels.cuda.ring import HIDDEN, SMALLEST_TOTAL
from build.kernels.shapes import RollingAttention

THREADS = 512  # per block
TOGETHER = 8  # shares whose numbers a thread loads at once


def joined_shares(shape: RollingAttention, on: Binding):
    """Inline `join(positions, largest, total, mixed, out)`: one block per query head, several threads per number."""
    B, H, D = shape.rows, shape.n_heads, shape.head_dim
    heads, count = heads_of_block(shape), splits(shape)
    lanes = -(-D // WARP) * WARP  # threads that take the numbers of a head
    parts = max(THREADS // lanes, 1)  # that the shares are dealt to
    threads, rounds = parts * lanes, -(-count // (parts * TOGETHER))

    @T.inline
    def weigh(largest, total, factors, totals, first, shares, r, t):
        """factors[s] = what share s is scaled by; totals[s] = its part of the sum."""
        best = T.alloc_buffer((1,), "float32", scope=on.private)
        best[0] = T.float32(HIDDEN)
        for s in T.serial(shares):
            best[0] = T.max(best[0], largest[first + s, r])
        for c in T.serial(-(-count // threads)):
            if c * threads + t < shares:
                factors[c * threads + t] = T.exp(largest[first + c * threads + t, r] - best[0])
                totals[c * threads + t] = (
                    T.exp(largest[first + c * threads + t, r] - best[0]) * total[first + c * threads + t, r]
                )

    @T.inline
    def add_part(mixed, factors, sums, first, shares, r, t):
        own = T.alloc_buffer((1,), "float32", scope=on.private)
        own[0] = T.float32(0)
        if t % lanes < D:
            for turn in T.serial(rounds):
                for u in on.unroll(TOGETHER):
                    s = (turn * TOGETHER + u) * parts + t // lanes
                    if s < shares:
                        own[0] = own[0] + factors[s] * mixed[first + s, r, t % lanes]
        sums[t] = own[0]

    @T.inline
    def join(positions, largest, total, mixed, out):
        for block in on.blocks(B * H):
            factors = T.alloc_buffer((count,), "float32", scope=on.shared)
            totals = T.alloc_buffer((count,), "float32", scope=on.shared)
            sums = T.alloc_buffer((threads,), "float32", scope=on.shared)
            first = block // heads * count
            shares = visible(shape, positions[block // H, 0]).blocks
            for t in on.threads(threads):
                weigh(largest, total, factors, totals, first, shares, block % heads, t)
            for t in on.threads(threads):
                add_part(mixed, factors, sums, first, shares, block % heads, t)
            for t in on.threads(threads):
                if t < D:
                    found = T.alloc_buffer((2,), "float32", scope=on.private)
                    found[0] = T.float32(0)
                    found[1] = T.float32(0)
                    for s in T.serial(shares):
                        found[0] = found[0] + totals[s]
                    for part in on.unroll(parts):
                        found[1] = found[1] + sums[part * lanes + t]
                    out[block // H, 0, block % H * D + t] = found[1] / T.max(found[0], T.float32(SMALLEST_TOTAL))

    return join
