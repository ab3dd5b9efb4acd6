"""The inputs of an attention kernel for `runtime.gpucheck`, and what it must return and store, in float64."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from runtime.artifact.caches import CacheFormat, cache_format
from runtime.artifact.manifest import KernelCall
from runtime.gpu_check.cache_numbers import random_part, stored, widened
from runtime.gpu_check.kernel_case import Expected, KernelCase, empty
from runtime.gpu_check.packed_matrix import EPS, Array
from runtime.gpu_check.random_tensors import Random

QUERIES = 6  # how many are compared
SMALLEST_HALF = 2.0**-24  # step of float16 near 0


def rolling_attention(call: KernelCall, random: Random, rounding: float) -> KernelCase:
    """Attention after one and a half windows: the ring buffer is full and has wrapped around.

    Numbers are multiples of 1 / 64 up to 2, and cos and sin multiples of 1 / 4 up to 1, so that rotated keys are exact
    in every format: none can be rounded differently from here, and what remains is the error of float32.
    """
    (shape,) = call.arguments
    batch, tokens, window, heads, kv_heads, dim = (
        shape[name] for name in ("batch", "tokens", "cache_len", "n_heads", "n_kv_heads", "head_dim")
    )
    qkv = random.whole(call.parameters[0].shape, -128, 129, "float32") / np.float32(64)
    scaling = shape["query_scaling"]
    first = window + window // 2 + (2 * scaling["original_context"] if scaling else 0)
    positions = np.broadcast_to(first + np.arange(tokens), (batch, tokens)).astype(np.int64)
    cos, sin = (random.whole(spec.shape, -4, 5, "float32") / np.float32(4) for spec in call.parameters[1:3])
    rings = [random_part(spec, random) for spec in call.parameters[4:-1]]
    how = cache_format(shape["cache_dtype"])
    seen = Seen.of(qkv, cos, sin, rings, how, first, heads, kv_heads, dim, window)
    queries = [(b, i) for b in range(batch) for i in random.sample(tokens, QUERIES)]
    factors = [_position_factor(scaling, first + i) for _, i in queries]
    found = [
        seen.attended(b, i, shape["scale"], factor, rounding) for (b, i), factor in zip(queries, factors, strict=True)
    ]
    values, bounds = zip(*found, strict=True)
    index = tuple(np.array(queries).T)
    output = len(call.parameters) - 1
    expected = [
        Expected(output, lambda out: out[index].reshape(len(queries), heads, dim), np.stack(values), np.stack(bounds))
    ]
    held = tuple(range(4, output))
    for ring, columns in zip(held, seen.rings_afterwards(), strict=True):
        expected.append(Expected(ring, lambda found: found, columns, np.zeros(columns.shape)))
    arrays = [qkv, cos, sin, positions, *rings, empty(call.parameters[output])]
    return KernelCase(arrays, held, output, tuple(expected))


def _position_factor(scaling: Mapping[str, float] | None, position: int) -> float:
    """What a query at a position is multiplied by besides the softmax's scale."""
    if scaling is None:
        return 1.0
    return float(1 + scaling["beta"] * np.log1p(position // scaling["original_context"]))


@dataclass(frozen=True)
class Seen:
    """Everything that the queries of a call may see, in float64."""

    queries: Array  # (B, T, heads, head_dim), rotated
    new: Sequence[Array]  # (B, T, kv_heads, width), the new keys, rotated, and values as stored: the parts by turns
    rings: Sequence[Array]  # (B, kv_heads, W, width), likewise
    how: CacheFormat
    first: int
    window: int

    @classmethod
    def of(
        cls,
        qkv: Array,
        cos: Array,
        sin: Array,
        rings: Sequence[Array],
        how: CacheFormat,
        first: int,
        heads: int,
        kv_heads: int,
        dim: int,
        window: int,
    ) -> "Seen":
        """Built from a kernel's inputs."""
        parts = qkv.astype(np.float64).reshape(*qkv.shape[:2], heads + 2 * kv_heads, dim)
        c, s = (x.astype(np.float64).transpose(0, 2, 1, 3) for x in (cos, sin))  # (B, T, 1, head_dim / 2)

        def rotated(x: Array) -> Array:
            a, b = np.split(x, 2, axis=-1)
            return np.concatenate([a * c - b * s, b * c + a * s], axis=-1)

        keys, values = rotated(parts[:, :, heads : heads + kv_heads]), parts[:, :, heads + kv_heads :]
        by_side = [stored(columns.astype(np.float32), how) for columns in (keys, values)]
        new = [part for pair in zip(*by_side, strict=True) for part in pair]
        return cls(rotated(parts[:, :, :heads]), new, rings, how, first, window)

    def attended(self, b: int, i: int, scale: float, factor: float, rounding: float) -> tuple[Array, Array]:
        """One query's outputs (heads, head_dim) and their bounds.

        Scaling rounds once, the dot product head_dim + 1 times; the factor of a position five times, and then a query
        is no longer exact in float16. A number that is stored with a scale is rounded at most twice when it is widened,
        and to float16 where queries are. A score that is off by e changes its share by e, and the sum of shares by as
        much; then come exp and the sums over the slots. Shares that are rounded to float16 (exp of at most 0) are off
        by `rounding` or by half of float16's smallest step.
        """
        position = self.first + i
        past = np.arange(max(position - self.window + 1, 0), self.first) % self.window
        new = slice(max(position - self.window + 1 - self.first, 0), i + 1)
        seen = [
            np.concatenate([ring[b][:, past], columns[b, new].transpose(1, 0, 2)], axis=1)
            for ring, columns in zip(self.rings, self.new, strict=True)
        ]
        (key, key_size), (value, value_size) = widened(seen[0::2]), widened(seen[1::2])  # (kv_heads, seen, head_dim)
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

    def rings_afterwards(self) -> Iterator[Array]:
        """Each tensor of the ring buffers afterwards, exact to the bit."""
        tokens = self.new[0].shape[1]
        kept = np.arange(max(tokens - self.window, 0), tokens)
        slots = (self.first + kept) % self.window
        for ring, columns in zip(self.rings, self.new, strict=True):
            after = ring.astype(np.float64)
            after[:, :, slots] = columns[:, kept].transpose(0, 2, 1, 3)
            yield after
