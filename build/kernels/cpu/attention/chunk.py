"""Attention of a chunk: several tokens of one slot, whose queries are in tiles of rows."""

from tvm.script import tirx as T

from build.kernels.cpu.attention.columns import Columns, Softmax
from build.kernels.cpu.attention.parts import part_attention, parts_joined, parts_of, parts_used, state_clearer
from build.kernels.cpu.attention.tokens import Queries, Token, column_writer, query_clearer, query_sizes, query_writer
from build.kernels.cpu.level import Level, balanced_rows, fitting_lanes
from build.kernels.shapes import RollingAttention

TILES_TOGETHER = 4  # tiles of a task, for which a part of the ring is read from memory once and then from a cache


def chunk(level: Level, shape: RollingAttention):
    """Body of `rolling_attention` for several tokens of one slot."""
    N, H, KV, D, L = shape.tokens, shape.n_heads, shape.n_kv_heads, shape.head_dim, shape.ring_len
    group = H // KV
    R = balanced_rows(N * group, level.tile.rows)
    tiles = -(-(N * group) // R)
    together = min(TILES_TOGETHER, tiles)
    tasks = -(-tiles // together)
    parts, _ = parts_of(shape)
    size = query_sizes(shape, KV * tiles * R)
    write_query, clear_query = query_writer(level, shape), query_clearer(level, shape)
    write = column_writer(level, shape)
    attend, clear, join = part_attention(level, shape, R), state_clearer(level, R, D), parts_joined(level, shape, R)
    clear_output = _output_clearer(level, shape)

    @T.inline
    def body(qkv, cos, sin, positions, slots, keys, values, out):
        numbers = T.alloc_buffer((size.numbers,), size.dtype)
        scales = T.alloc_buffer((size.scales,), "float32")
        sums = T.alloc_buffer((size.sums,), "float32")
        count = T.alloc_buffer((1,), "int32")  # tokens before the padding
        count[0] = 0
        for i in T.serial(N):
            if positions[0, i] >= T.int64(0):
                count[0] = i + 1
        for i in T.parallel(N):
            if i < count[0]:
                for h in T.serial(H):
                    write_query(
                        Token(qkv, cos, sin, positions, 0, i),
                        h,
                        Queries(numbers, scales, sums),
                        h // group * tiles * R + i * group + h % group,
                    )
                write(Token(qkv, cos, sin, positions, 0, i), slots, keys, values)
        for i in T.serial(KV * R):
            row = count[0] * group + i % R
            if row // R == (count[0] * group - 1) // R:
                clear_query(Queries(numbers, scales, sums), i // R * tiles * R + row)
        for task in T.parallel(KV * tasks):
            # Late tiles see more keys than early ones: they alternate, so that any run of tasks is balanced.
            folded = task % tasks
            first_tile = T.if_then_else(folded % 2 == 0, folded // 2, tasks - 1 - folded // 2) * together
            kv = task // tasks
            first = T.Cast("int32", positions[0, 0])
            oldest = T.alloc_buffer((R,), "int32")
            newest = T.alloc_buffer((R,), "int32")
            largest = T.alloc_buffer((together * parts * R,), "float32")
            total = T.alloc_buffer((together * parts * R,), "float32")
            mixed = T.alloc_buffer((together * parts * R * D,), "float32")
            for part in T.serial(parts):
                for t in T.serial(together):
                    tile = first_tile + t
                    last = T.min((tile * R + R - 1) // group, count[0] - 1)  # the tile's last token
                    end = first + last + 1  # number of positions that its queries may see
                    if T.And(tile < tiles, T.And(tile * R // group < count[0], part < parts_used(shape, end))):
                        for r in T.unroll(R):
                            newest[r] = T.min(first + (tile * R + r) // group, end - 1)
                            oldest[r] = T.max(newest[r] - (shape.window - 1), 0)
                        clear(largest, total, mixed, t * parts + part)
                        attend(
                            Queries(numbers, scales, sums),
                            kv * tiles + tile,
                            Columns(keys, values, (T.Cast("int32", slots[0]) * KV + kv) * L, end - end % L, end % L),
                            part,
                            T.min(end, L),
                            Softmax(oldest, newest, largest, total, mixed, (t * parts + part) * R),
                        )
            for i in T.serial(together * R):
                row = first_tile * R + i
                token = row // group
                tile_end = first + T.min((row // R * R + R - 1) // group, count[0] - 1) + 1
                at = token * H * D + (kv * group + row % group) * D
                if row < N * group:
                    if row // R * R // group < count[0]:
                        join(largest, total, mixed, i // R * parts, parts_used(shape, tile_end), i % R, out, at)
                    else:
                        clear_output(out, at)

    return body


def _output_clearer(level: Level, shape: RollingAttention):
    """Inline `clear(out, at)`: a head's output of a token of padding; it must be finite, though nothing reads it."""
    D, lanes = shape.head_dim, fitting_lanes(level, shape.head_dim)

    @T.inline
    def clear(out, at):
        flat_out = T.decl_buffer((shape.tokens * shape.n_heads * D,), "float32", data=out.data)
        for c in T.serial(D // lanes):
            for v in T.vectorized(lanes):
                flat_out[at + c * lanes + v] = T.float32(0)

    return clear
