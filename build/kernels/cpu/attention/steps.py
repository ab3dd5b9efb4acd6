"""Attention of a step: rows of one token each, every one in a slot of its own or after others of its slot."""

from math import gcd

from tvm.script import tirx as T

from build.kernels.cpu.attention.columns import Columns, Softmax
from build.kernels.cpu.attention.parts import part_attention, parts_joined, parts_of, parts_used, state_clearer
from build.kernels.cpu.attention.tokens import Queries, Token, column_writer, query_clearer, query_sizes, query_writer
from build.kernels.cpu.level import Level, balanced_rows
from build.kernels.shapes import RollingAttention

ROWS_AT_ONCE = 4  # rows whose columns are written by one thread sooner than several threads start


def steps(level: Level, shape: RollingAttention):
    """Body of `rolling_attention` for rows of one token."""
    B, H, KV, D, L = shape.rows, shape.n_heads, shape.n_kv_heads, shape.head_dim, shape.ring_len
    group = H // KV
    R = balanced_rows(group, level.tile.rows)
    tiles = -(-group // R)
    parts, _ = parts_of(shape)
    size = query_sizes(shape, B * KV * tiles * R)
    write_query, clear_query = query_writer(level, shape), query_clearer(level, shape)
    write = column_writer(level, shape)
    attend, clear, join = part_attention(level, shape, R), state_clearer(level, R, D), parts_joined(level, shape, R)
    loop = T.parallel if B > ROWS_AT_ONCE else T.serial

    @T.inline
    def body(qkv, cos, sin, positions, slots, keys, values, out):
        numbers = T.alloc_buffer((size.numbers,), size.dtype)
        scales = T.alloc_buffer((size.scales,), "float32")
        sums = T.alloc_buffer((size.sums,), "float32")
        largest = T.alloc_buffer((B * KV * tiles * parts * R,), "float32")
        total = T.alloc_buffer((B * KV * tiles * parts * R,), "float32")
        mixed = T.alloc_buffer((B * KV * tiles * parts * R * D,), "float32")
        for b in loop(B):
            for h in T.serial(KV * tiles * R):
                if h % (tiles * R) < group:
                    write_query(
                        Token(qkv, cos, sin, positions, b, 0),
                        h // (tiles * R) * group + h % (tiles * R),
                        Queries(numbers, scales, sums),
                        b * KV * tiles * R + h,
                    )
                else:
                    clear_query(Queries(numbers, scales, sums), b * KV * tiles * R + h)
            write(Token(qkv, cos, sin, positions, b, 0), slots, keys, values)
        for turn in T.parallel(B * KV * tiles * parts):
            # Only the first parts of a ring that is not full have work: they are spread over all turns.
            place = turn * _spread(B * KV * tiles * parts) % (B * KV * tiles * parts)
            task = place % (B * KV * tiles) * parts + place // (B * KV * tiles)
            b = task // (KV * tiles * parts)
            kv = task // (tiles * parts) % KV
            end = T.Cast("int32", positions[b, 0]) + 1  # number of positions that the ring holds or has held
            oldest = T.alloc_buffer((R,), "int32")
            newest = T.alloc_buffer((R,), "int32")
            for r in T.unroll(R):
                oldest[r] = T.max(end - shape.window, 0)
                newest[r] = end - 1
            if task % parts < parts_used(shape, end):
                clear(largest, total, mixed, task)
                attend(
                    Queries(numbers, scales, sums),
                    task // parts,
                    Columns(keys, values, (T.Cast("int32", slots[b]) * KV + kv) * L, end - end % L, end % L),
                    task % parts,
                    T.min(end, L),
                    Softmax(oldest, newest, largest, total, mixed, task * R),
                )
        for row in T.serial(B * H):
            tile = row // group * tiles + row % group // R
            used = parts_used(shape, T.Cast("int32", positions[row // H, 0]) + 1)
            join(largest, total, mixed, tile * parts, used, row % group % R, out, row * D)

    return body


def _spread(count: int) -> int:
    """A stride that visits all of `count` places, so that any run of turns meets any run of places about equally often.

    It is the golden section of the count, or the next number without a common divisor (Knuth, TAOCP 3, 6.4).
    """
    return next(n for n in range(max(round(0.618 * count), 1), 2 * count + 1) if gcd(n, count) == 1)
