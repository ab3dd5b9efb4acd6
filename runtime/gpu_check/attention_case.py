"""The inputs of an attention kernel for `runtime.gpucheck`, and what it must return and store, in float64."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtime.artifact.caches import CacheFormat, cache_format
from runtime.artifact.manifest import KernelCall
from runtime.gpu_check.cache_numbers import random_part, stored, widened
from runtime.gpu_check.kernel_case import Expected, KernelCase, empty
from runtime.gpu_check.packed_matrix import EPS, Array
from runtime.gpu_check.random_tensors import Random

QUERIES = 6  # how many are compared, at most
RINGS = 5  # the first parameter that is part of a ring
LEAST_PADDED = 16  # tokens of a call whose last is padding: of fewer, it would be too large a share of the time
SMALLEST_HALF = 2.0**-24  # step of float16 near 0


def rolling_attention(call: KernelCall, random: Random, rounding: float) -> KernelCase:
    """Attention of tokens whose windows are full, on rings that have wrapped around if they ever do.

    Rows of a step are of several slots, in any order: see `_tokens`. Numbers are multiples of 1 / 64 up to 2, and cos
    and sin multiples of 1 / 4 up to 1, so that rotated keys are exact in every format: none can be rounded differently
    from here, and what remains is the error of float32.
    """
    (shape,) = call.arguments
    heads, kv_heads, dim, window = (shape[name] for name in ("n_heads", "n_kv_heads", "head_dim", "window"))
    qkv = random.whole(call.parameters[0].shape, -128, 129, "float32") / np.float32(64)
    scaling = shape["query_scaling"]
    positions, slots = _tokens(shape, random)
    cos, sin = (random.whole(spec.shape, -4, 5, "float32") / np.float32(4) for spec in call.parameters[1:3])
    how = cache_format(shape["cache_dtype"])
    rings = [random_part(spec, how, random) for spec in call.parameters[RINGS:-1]]
    seen = Seen.of(qkv, cos, sin, positions, slots, rings, how, heads, kv_heads, dim)
    written = np.argwhere(positions >= 0)
    queries = [tuple(written[i]) for i in random.sample(len(written), QUERIES)]
    found = [
        seen.attended(b, i, window, shape["scale"], _position_factor(scaling, positions[b, i]), rounding)
        for b, i in queries
    ]
    values, bounds = zip(*found, strict=True)
    index = tuple(np.array(queries).T)
    output = len(call.parameters) - 1
    expected = [
        Expected(output, lambda out: out[index].reshape(len(queries), heads, dim), np.stack(values), np.stack(bounds))
    ]
    held = tuple(range(RINGS, output))
    for ring, columns in zip(held, seen.rings, strict=True):
        expected.append(Expected(ring, lambda found: found, columns, np.zeros(columns.shape)))
    arrays = [qkv, cos, sin, positions, slots, *rings, empty(call.parameters[output])]
    return KernelCase(arrays, held, output, tuple(expected))


def _tokens(shape: Mapping[str, Any], random: Random) -> tuple[Array, Array]:
    """Positions (B, T) and slots (B,) of a call.

    One row is of one slot. Of several rows, the first third are consecutive tokens of one slot, as drafts are, the
    others are of other slots as far as there are any, each at a position of its own, and all are in random order. The
    last token of many is padding.
    """
    rows, tokens, slots, ring_len = (shape[name] for name in ("rows", "tokens", "slots", "ring_len"))
    drafts = -(-rows // 3) if slots > 1 else rows
    chosen = random.permutation(slots)
    of_row = np.array([chosen[0] if row < drafts else chosen[1 + row % (slots - 1)] for row in range(rows)])
    added = max(np.bincount(of_row).max(), tokens)
    past = shape["window"] + shape["window"] // 2
    if shape["query_scaling"]:
        past += 2 * shape["query_scaling"]["original_context"]
    wraps = ring_len >= shape["window"] + added - 1
    next_of = {slot: past + 3 * i if wraps else max(ring_len - added - i, 0) for i, slot in enumerate(chosen)}
    positions = np.empty((rows, tokens), np.int64)
    for row, slot in enumerate(of_row):
        positions[row] = next_of[slot] + np.arange(tokens)
        next_of[slot] += tokens
    if rows * tokens >= LEAST_PADDED:
        positions[-1, -1] = -1
    order = random.permutation(rows)
    return positions[order], of_row[order].astype(np.int64)


def _position_factor(scaling: Mapping[str, float] | None, position: int) -> float:
    """What a query at a position is multiplied by besides the softmax's scale."""
    if scaling is None:
        return 1.0
    return float(1 + scaling["beta"] * np.log1p(position // scaling["original_context"]))


@dataclass(frozen=True)
class Seen:
    """What the queries of a call see, in float64: its own columns too, which are written first."""

    queries: Array  # (B, T, heads, head_dim), rotated
    positions: Array  # (B, T)
    slots: Array  # (B,)
    rings: Sequence[Array]  # (slots, kv_heads, ring_len, width), keys and values by turns, as the call leaves them
    how: CacheFormat

    @classmethod
    def of(
        cls,
        qkv: Array,
        cos: Array,
        sin: Array,
        positions: Array,
        slots: Array,
        rings: Sequence[Array],
        how: CacheFormat,
        heads: int,
        kv_heads: int,
        dim: int,
    ) -> "Seen":
        """Built from a kernel's inputs."""
        parts = qkv.astype(np.float64).reshape(*qkv.shape[:2], heads + 2 * kv_heads, dim)
        c, s = (x.astype(np.float64).transpose(0, 2, 1, 3) for x in (cos, sin))  # (B, T, 1, head_dim / 2)

        def rotated(x: Array) -> Array:
            a, b = np.split(x, 2, axis=-1)
            return np.concatenate([a * c - b * s, b * c + a * s], axis=-1)

        keys, values = rotated(parts[:, :, heads : heads + kv_heads]), parts[:, :, heads + kv_heads :]
        by_side = [stored(columns.astype(np.float32), how) for columns in (keys, values)]
        after = [ring.copy() for ring in rings]
        for ring, columns in zip(after, (part for pair in zip(*by_side, strict=True) for part in pair), strict=True):
            for b, i in np.argwhere(positions >= 0):
                ring[slots[b], :, positions[b, i] % ring.shape[2]] = columns[b, i]
        return cls(rotated(parts[:, :, :heads]), positions, slots, after, how)

    def attended(
        self, b: int, i: int, window: int, scale: float, factor: float, rounding: float
    ) -> tuple[Array, Array]:
        """One query's outputs (heads, head_dim) and their bounds.

        Scaling rounds once, the dot product head_dim + 1 times; the factor of a position five times, and then a query
        is no longer exact in float16. A number that is stored with a scale is rounded at most twice when it is widened,
        and to float16 where queries are. A score that is off by e changes its share by e, and the sum of shares by as
        much; then come exp and the sums over the columns. Shares that are rounded to float16 (exp of at most 0) are off
        by `rounding` or by half of float16's smallest step.
        """
        position = self.positions[b, i]
        columns = np.arange(max(position - window + 1, 0), position + 1) % self.rings[0].shape[2]
        seen = [ring[self.slots[b]][:, columns] for ring in self.rings]
        # (kv_heads, seen, head_dim)
        (key, key_size), (value, value_size) = (widened(seen[side::2], self.how) for side in range(2))
        query = self.queries[b, i].reshape(len(key), -1, key.shape[-1])  # (kv_heads, group, head_dim)
        scores = query @ key.transpose(0, 2, 1) * scale * factor
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        size = (np.abs(query) @ key_size.transpose(0, 2, 1)).max() * scale * factor
        scaled = self.how.scales is not None
        roundings = key.shape[-1] + (4 if factor == 1 else 9) + 2 * scaled
        halves = rounding * ((factor != 1) + scaled)
        error = 2 * (roundings * EPS + halves) * size + (key.shape[1] + 8 + 2 * scaled) * EPS + rounding * scaled
        mixed, magnitude = shares @ value, shares @ value_size
        heads = self.queries.shape[2]
        rounded = rounding * magnitude + (SMALLEST_HALF / 2 if rounding else 0) * value_size.sum(1, keepdims=True)
        return mixed.reshape(heads, -1), (error * magnitude + rounded).reshape(heads, -1)
