"""Seeded random numbers for kernels and whole models, of about the magnitudes in a real model."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from runtime.artifact.manifest import TensorSpec, WeightSpec
from runtime.artifact.tensor_file import numpy_dtype
from runtime.gpu_check.packed_matrix import Array

POOL = 2**20 - 3  # random numbers that larger arrays repeat; not a multiple of a row's length
# Standard deviation of uniform numbers: from -127 to 127 in int8, whose scales are a vector, and from -8 to 7 in groups
# of 4-bit numbers.
SPREAD_OF_ROWS, SPREAD_OF_GROUPS = 73.3, 4.6


@dataclass
class Random:
    """Seeded random numbers; large arrays repeat a pool, since speed and sums do not depend on it."""

    seed: int
    generator: np.random.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = np.random.default_rng(self.seed)

    def normal(self, shape: Sequence[int], dtype: str = "float32", scale: float = 1.0) -> Array:
        """Normally distributed numbers with standard deviation `scale`."""
        return self._repeated(
            (self.generator.standard_normal(self._pool(shape), np.float32) * np.float32(scale)).astype(dtype), shape
        )

    def uniform(self, shape: Sequence[int], low: float, high: float, dtype: str) -> Array:
        """Numbers between two limits."""
        return self._repeated(self.generator.uniform(low, high, self._pool(shape)).astype(dtype), shape)

    def whole(self, shape: Sequence[int], low: int, high: int, dtype: str) -> Array:
        """Whole numbers from low to high - 1."""
        return self._repeated(self.generator.integers(low, high, self._pool(shape)).astype(dtype), shape)

    def weight(self, spec: TensorSpec | WeightSpec, k: int) -> Array:
        """One tensor of a packed matrix: numbers, scales or zero points, such that entries are about 1 / sqrt(K)."""
        if spec.dtype == "int32":
            return self.whole(spec.shape, -(2**31), 2**31, "int32")
        if spec.dtype == "int8":
            return self.whole(spec.shape, -127, 128, "int8")
        if spec.dtype == "uint8":
            return self.whole(spec.shape, 0, 16, "uint8")
        if len(spec.shape) == 4:
            return self.normal(spec.shape, spec.dtype, k**-0.5)
        size = k**-0.5 / (SPREAD_OF_ROWS if len(spec.shape) == 1 else SPREAD_OF_GROUPS)
        return self.uniform(spec.shape, 0.5 * size, 1.5 * size, spec.dtype)

    @staticmethod
    def _pool(shape: Sequence[int]) -> int:
        return min(int(np.prod(shape)), POOL)

    @staticmethod
    def _repeated(pool: Array, shape: Sequence[int]) -> Array:
        return pool.reshape(shape) if pool.size == np.prod(shape) else np.resize(pool, shape)

    def sample(self, size: int, count: int) -> list[int]:
        """At most `count` different indices, including the first and the last."""
        inner = self.generator.permutation(np.arange(1, max(size - 1, 1)))[: max(count - 2, 0)]
        return sorted({0, size - 1, *inner.tolist()})


def random_weights(specs: Sequence[WeightSpec], seed: int = 0) -> dict[str, Array]:
    """Weights by name for a whole model; tensors of one shape and kind share their memory."""
    made = lru_cache(maxsize=None)(
        lambda shape, dtype, k: _random_tensor(TensorSpec(name="w", shape=shape, dtype=dtype), k, seed)
    )
    inner = {spec.name: _inner(spec) for spec in specs}
    return {
        spec.name: made(spec.shape, spec.dtype, inner.get(spec.name.removesuffix(_suffix(spec.name)))) for spec in specs
    }


def _suffix(name: str) -> str:
    return next((suffix for suffix in ("_scale", "_zero_point") if name.endswith(suffix)), "")


def _inner(spec: WeightSpec) -> int:
    """K of a packed matrix, including padding; 1 for a vector."""
    return spec.shape[1] * (32 if spec.dtype == "int32" else spec.shape[3]) if len(spec.shape) == 4 else 1


def _random_tensor(spec: TensorSpec, k: int, seed: int) -> Array:
    """A vector of ones for a norm's gain, otherwise as `Random.weight`."""
    random = Random(seed)
    if len(spec.shape) == 1 and k == 1:
        return np.ones(spec.shape, numpy_dtype(spec.dtype))
    return random.weight(spec, k)
