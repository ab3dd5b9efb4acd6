"""Attention over rings by its definition, in float64: calls, their inputs, and what outputs and rings must hold."""

from typing import NamedTuple

import numpy as np

from build.kernels.shapes import RollingAttention
from runtime.artifact.caches import cache_format
from runtime.artifact.tensor_file import bits_dtype
from tests.helpers import cache_reference
from tests.helpers.rotary_reference import query_factor

FLOAT32 = np.finfo(np.float32).eps


class Model(NamedTuple):
    """Sizes of one layer and of its rings."""

    heads: int
    kv_heads: int
    dim: int
    window: int
    ring_len: int
    slots: int = 1

    def shape(self, rows, tokens, dtype="float16", query_scaling=None):
        """The kernel's arguments for a call."""
        return RollingAttention(
            rows,
            tokens,
            self.heads,
            self.kv_heads,
            self.dim,
            self.slots,
            self.window,
            self.ring_len,
            dtype,
            self.dim**-0.5,
            query_scaling,
        )


class Call(NamedTuple):
    """Positions (B, T) of a call, and the slot of each row."""

    positions: list[list[int]]
    slots: list[int]


def chunk(slot, first, count, tokens):
    """A prefill of `count` tokens, padded to `tokens`."""
    return Call([[*range(first, first + count), *[-1] * (tokens - count)]], [slot])


def step(*rows):
    """A step of rows, each a slot and a position."""
    return Call([[position] for _, position in rows], [slot for slot, _ in rows])


def is_rounded(dtype):
    """Whether a cache is so coarse that keys must be exact before they are rounded."""
    return dtype not in ("float32", "float16")


def tolerance(dtype, *, exact, tensor_cores=False):
    """How far outputs may be off, for numbers of normal distributions.

    float16 keys may round the other way after a float32 rotation, unless that is `exact`, and tensor cores take all
    numbers as float16: half an ulp of 2^-11 on scores of about 4 and on the values.
    """
    return 2e-5 if dtype == "float32" or (exact and not tensor_cores) else 4e-3


def output_of(shape):
    """The output before it is written."""
    return np.full((shape.rows, shape.tokens, shape.n_heads * shape.head_dim), np.nan, np.float32)


def rings_of(model, dtype):
    """Rings in which nothing was written."""
    return [
        np.full(
            (model.slots, model.kv_heads, model.ring_len, part.width),
            np.nan if bits_dtype(part.dtype).kind == "f" else 119,
            bits_dtype(part.dtype),
        )
        for part in cache_format(dtype).parts(model.dim)
        for _side in ("keys", "values")
    ]


def angles(positions, half, turns=None):
    """The rotary cosines and sines (B, 1, T, half), or random quarter turns.

    Those are exact in float32: before they are rounded to levels, no number may fall on the other side of a half.
    """
    if turns is None:
        found = positions[:, None, :, None] * 10.0 ** -np.arange(half)
        return np.cos(found).astype(np.float32), np.sin(found).astype(np.float32)
    quarters = turns.integers(0, 4, (len(positions), 1, positions.shape[1], half))
    return np.array([1, 0, -1, 0], np.float32)[quarters], np.array([0, 1, 0, -1], np.float32)[quarters]


def check_rings(rings, before, columns, *, exact):
    """Columns hold what was written to them last; those that were never written keep their bytes.

    Unless `exact`, keys may be off by as much as the rotation and one rounding.
    """
    ulp = 0 if exact else np.finfo(rings[0].dtype).eps
    for slot, written in enumerate(columns):
        for column in range(rings[0].shape[2]):
            for ring, (found, old) in enumerate(zip(rings, before, strict=True)):
                if column not in written:
                    np.testing.assert_array_equal(found[slot, :, column], old[slot, :, column])
                elif ring == 0:
                    expected = written[column][0][0]
                    np.testing.assert_allclose(
                        found[slot, :, column], expected, rtol=ulp, atol=0 if exact else 4 * FLOAT32
                    )
                else:
                    np.testing.assert_array_equal(found[slot, :, column], written[column][ring % 2][ring // 2])


def rotate(heads, cos, sin):
    a, b = np.split(heads.astype(np.float64), 2, axis=-1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def reference(shape, qkv, cos, sin, call, history, columns):
    """Attention by its definition, from everything that each slot has seen so far; adds the new columns to it.

    The last token at a position counts, so that what comes again after tokens were taken back replaces them.
    """
    group = shape.n_heads // shape.n_kv_heads
    out = np.zeros((shape.rows, shape.tokens, shape.n_heads * shape.head_dim))
    tokens = [
        (slot, position, row, i)
        for row, slot in enumerate(call.slots)
        for i, position in enumerate(call.positions[row])
        if position >= 0
    ]
    heads = {}
    for slot, position, row, i in tokens:
        parts = qkv[row, i].reshape(-1, shape.head_dim)
        q, k, v = np.split(parts, [shape.n_heads, shape.n_heads + shape.n_kv_heads])
        heads[row, i] = rotate(q, cos[row, 0, i], sin[row, 0, i]) * query_factor(shape.query_scaling, position)
        rotated_k = rotate(k, cos[row, 0, i], sin[row, 0, i])
        column = tuple(cache_reference.stored(x, shape.cache_dtype) for x in (rotated_k, v))
        history[slot][position] = columns[slot][position % shape.ring_len] = column
    for slot, position, row, i in tokens:
        seen = range(max(position - shape.window + 1, 0), position + 1)
        visible = [tuple(map(cache_reference.widened, history[slot][p])) for p in seen]
        for h, query in enumerate(heads[row, i]):
            scores = np.array([shape.scale * (query @ key[h // group]) for key, _ in visible])
            weight = np.exp(scores - scores.max())
            mixed = sum(w * value[h // group] for w, (_, value) in zip(weight / weight.sum(), visible, strict=True))
            out[row, i, h * shape.head_dim : (h + 1) * shape.head_dim] = mixed
    return out
