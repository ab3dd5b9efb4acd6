"""Rolling attention: split qkv, rotate, attend over past and new, then write the new columns into the ring. No copy of the cache.

The graph keeps its cache in order of position and shifts it left at each step; here the key of position p stays in slot p mod W for good, so
a step writes T columns and moves none. Before a chunk at positions p0 .. p0 + T - 1 the ring holds the positions below p0. Worked example,
W = 4, p0 = 6: slots 0 1 2 3 hold positions 4 5 2 3, and query 6 sees 3 4 5 and itself: slots 3 0 1, then the new column.

Attention must finish before the ring is written: with T > 1 the new columns replace positions that the first queries still see.
Bytes per query: 2 visible n_kv_heads head_dim itemsize at least; operations: 4 visible n_heads head_dim.
"""

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from build.kernels.cpu.vector import LANES, exp
from build.kernels.shapes import RollingAttention


def rolling_attention(shape: RollingAttention) -> PrimFunc:
    """Kernel of qkv (B, T, qkv_dim), cos and sin (B, 1, T, head_dim / 2), positions (B, T) and both rings, to out (B, T, n_heads * head_dim).

    Positions are consecutive in each row; negative ones are padding: they are neither written nor seen. Arguments: qkv, cos, sin, positions,
    key ring, value ring (both updated in place), with `out` as a new tensor in front of the rings' results.
    """
    B, N, H, KV, D, W = shape.batch, shape.tokens, shape.n_heads, shape.n_kv_heads, shape.head_dim, shape.cache_len
    half, group, dtype, scale = D // 2, H // KV, shape.cache_dtype, shape.scale
    lanes = max(n for n in (1, 2, 4, LANES) if D % n == 0)
    parts = D // lanes
    loop = T.parallel if N > 1 else T.serial  # one token's keys are too few to be worth waking a thread for
    k_start, v_start = H * D, (H + KV) * D

    @T.inline
    def rotate(qkv, cos, sin, b, i, start, out, out_start, factor):
        """out[out_start :] = factor * rotated qkv[b, i, start : start + D], in the ring's precision or float32."""
        for d in T.serial(half):
            out[out_start + d] = T.Cast(out.dtype, factor * (qkv[b, i, start + d] * cos[b, 0, i, d] - qkv[b, i, start + half + d] * sin[b, 0, i, d]))
            out[out_start + half + d] = T.Cast(
                out.dtype, factor * (qkv[b, i, start + half + d] * cos[b, 0, i, d] + qkv[b, i, start + d] * sin[b, 0, i, d])
            )

    @T.inline
    def dot(q, partial, columns, offset, scores, j):
        """scores[j] = q . columns[offset :], summed in `lanes` partial sums."""
        for v in T.vectorized(lanes):
            partial[v] = T.float32(0)
        for c in T.unroll(parts):
            for v in T.vectorized(lanes):
                partial[v] = partial[v] + q[c * lanes + v] * T.Cast("float32", columns[offset + c * lanes + v])
        scores[j] = T.float32(0)
        for v in T.unroll(lanes):
            scores[j] = scores[j] + partial[v]

    @T.inline
    def accumulate(mixed, weight, columns, offset):
        """mixed += weight * columns[offset :]."""
        for c in T.unroll(parts):
            for v in T.vectorized(lanes):
                mixed[c * lanes + v] = mixed[c * lanes + v] + weight * T.Cast("float32", columns[offset + c * lanes + v])

    @T.inline
    def softmax(scores, total, count):
        """scores[: count] to exp(score - maximum), their sum to total[0]; the tail of the last vector adds nothing."""
        total[0] = T.float32(-3e38)
        for j in T.serial(count):
            total[0] = T.max(total[0], scores[j])
        for j in T.serial(-(-count // LANES)):
            for v in T.vectorized(LANES):
                scores[j * LANES + v] = exp(scores[j * LANES + v] - total[0])
        total[0] = T.float32(0)
        for j in T.serial(count):
            total[0] = total[0] + scores[j]

    @T.prim_func
    def kernel(
        qkv: T.Buffer((B, N, shape.qkv_dim), "float32"),
        cos: T.Buffer((B, 1, N, half), "float32"),
        sin: T.Buffer((B, 1, N, half), "float32"),
        positions: T.Buffer((B, N), "int64"),
        keys: T.Buffer((B, KV, W, D), dtype),
        values: T.Buffer((B, KV, W, D), dtype),
        out: T.Buffer((B, N, H * D), "float32"),
    ):
        T.func_attr({"tirx.noalias": True, "op_pattern": 8})
        new_keys = T.alloc_buffer((B * N * KV * D,), dtype)
        new_values = T.alloc_buffer((B * N * KV * D,), dtype)
        ring_keys = T.decl_buffer((B * KV * W * D,), dtype, data=keys.data)
        ring_values = T.decl_buffer((B * KV * W * D,), dtype, data=values.data)
        for row in loop(B * N * KV):
            b = row // (N * KV)
            i = row % (N * KV) // KV
            h = row % KV
            rotate(qkv, cos, sin, b, i, k_start + h * D, new_keys, row * D, T.float32(1))
            for d in T.serial(D):
                new_values[row * D + d] = T.Cast(dtype, qkv[b, i, v_start + h * D + d])
        for row in T.parallel(B * N * H):
            b = row // (N * H)
            i = row % (N * H) // H
            h = row % H
            kv = h // group
            q = T.alloc_buffer((D,), "float32")
            partial = T.alloc_buffer((lanes,), "float32")
            total = T.alloc_buffer((1,), "float32")
            mixed = T.alloc_buffer((D,), "float32")
            scores = T.alloc_buffer((W + N + LANES,), "float32")
            first = T.Cast("int32", positions[b, 0])  # of the chunk
            oldest = T.max(first + i - (W - 1), 0)  # the first position that this query sees
            n_past = T.max(first - oldest, 0)
            new_start = T.max(oldest - first, 0)  # the first new column that it sees: padding and a chunk longer than W hide some
            n_new = T.max(i + 1 - new_start, 0)
            start = oldest % W
            base = (b * KV + kv) * W
            rotate(qkv, cos, sin, b, i, h * D, q, 0, T.float32(scale))
            for j in T.serial(n_past):
                dot(q, partial, ring_keys, (base + T.Select(start + j >= W, start + j - W, start + j)) * D, scores, j)
            for j in T.serial(n_new):
                dot(q, partial, new_keys, ((b * N + new_start + j) * KV + kv) * D, scores, n_past + j)
            softmax(scores, total, n_past + n_new)
            for c in T.unroll(parts):
                for v in T.vectorized(lanes):
                    mixed[c * lanes + v] = T.float32(0)
            for j in T.serial(n_past):
                accumulate(mixed, scores[j], ring_values, (base + T.Select(start + j >= W, start + j - W, start + j)) * D)
            for j in T.serial(n_new):
                accumulate(mixed, scores[n_past + j], new_values, ((b * N + new_start + j) * KV + kv) * D)
            for c in T.unroll(parts):
                for v in T.vectorized(lanes):
                    out[b, i, h * D + c * lanes + v] = mixed[c * lanes + v] / T.max(total[0], T.float32(1e-30))
        for row in loop(B * N * KV):
            b = row // (N * KV)
            i = row % (N * KV) // KV
            h = row % KV
            position = T.Cast("int32", positions[b, i])
            if position >= 0 and i >= N - W:  # of a chunk longer than the ring, only the last W columns stay
                for d in T.serial(D):
                    keys[b, h, position % W, d] = new_keys[row * D + d]
                    values[b, h, position % W, d] = new_values[row * D + d]

    return kernel
