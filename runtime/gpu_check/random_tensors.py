"""Seeded random numbers for kernels and whole models, of about the magnitudes in a real model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import numpy as np

from runtime.artifact.manifest import TensorSpec, WeightSpec
from runtime.artifact.tensor_file import numpy_dtype
from runtime.gpu_check.packed_matrix import Array

POOL = 2**20 - 3  # random numbers that larger arrays repeat; not a multiple of a row's length
PartKind = Literal["numbers", "scales", "offsets", "order"]
PARTS: tuple[PartKind, ...] = ("numbers", "scales", "offsets", "order")  # as kernels take them
SUFFIXES: Mapping[str, PartKind] = {  # of names in a manifest
    "_scale": "scales",
    "_zero_point": "offsets",
    "_minimum": "offsets",
    "_order": "order",
}
# By the dtype of packed numbers: the standard deviation of random ones, which are uniform, from -127 to 127 in int8,
# from -8 to 7 in words of 4 bits, and over the bits of e4m3; and the range of minimums, in scales.
SPREADS = {"int8": 73.3, "int32": 4.6, "uint8": 100.1}
MINIMUMS = {"int8": (-20.0, 20.0), "int32": (-9.0, -6.0)}
ZERO_POINTS = {"int8": (-16, 16), "uint8": (0, 16)}  # by their dtype: the first and the one past the last


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

    def part(self, kind: PartKind, spec: TensorSpec | WeightSpec, numbers: str, k: int) -> Array:
        """One tensor of a packed matrix, such that weights are about 1 / sqrt(K); `numbers` is the numbers' dtype."""
        if kind == "order":
            return self.generator.permutation(spec.shape[0]).astype(np.int32)
        if kind == "numbers":
            return self._numbers(spec, k)
        if spec.dtype in ZERO_POINTS:
            return self.whole(spec.shape, *ZERO_POINTS[spec.dtype], spec.dtype)
        size = k**-0.5 / SPREADS.get(numbers, 1.0)
        low, high = (0.5, 1.5) if kind == "scales" else MINIMUMS[numbers]
        return self.uniform(spec.shape, low * size, high * size, spec.dtype)

    def _numbers(self, spec: TensorSpec | WeightSpec, k: int) -> Array:
        if spec.dtype == "int32":
            return self.whole(spec.shape, -(2**31), 2**31, "int32")
        if spec.dtype == "int8":
            return self.whole(spec.shape, -127, 128, "int8")
        if spec.dtype == "uint8":
            bits = self.whole(spec.shape, 0, 256, "uint8")
            return np.where(bits & 127 == 127, bits ^ 1, bits)
        return self.normal(spec.shape, spec.dtype, k**-0.5)

    @staticmethod
    def _pool(shape: Sequence[int]) -> int:
        return min(int(np.prod(shape)), POOL)

    @staticmethod
    def _repeated(pool: Array, shape: Sequence[int]) -> Array:
        return pool.reshape(shape) if pool.size == np.prod(shape) else np.resize(pool, shape)

    def permutation(self, size: int) -> Array:
        """The numbers below `size` in random order."""
        return self.generator.permutation(size)

    def sample(self, size: int, count: int) -> list[int]:
        """At most `count` different indices, including the first and the last."""
        inner = self.generator.permutation(np.arange(1, max(size - 1, 1)))[: max(count - 2, 0)]
        return sorted({0, size - 1, *inner.tolist()})


@lru_cache(maxsize=2)
def stacked_numbers(spec: TensorSpec, k: int) -> Array:
    """The numbers of the matrices of all experts: they take gigabytes, so kernels of one shape share them."""
    numbers = Random(0).part("numbers", spec, spec.dtype, k)
    numbers.flags.writeable = False
    return numbers


def random_weights(specs: Sequence[WeightSpec], seed: int = 0) -> dict[str, Array]:
    """Weights by name for a whole model; tensors of one shape and kind share their memory."""
    made = lru_cache(maxsize=None)(
        lambda kind, shape, dtype, numbers, k: _random_tensor(
            kind, TensorSpec(name="w", shape=shape, dtype=dtype), numbers, k, seed
        )
    )
    by_name = {spec.name: spec for spec in specs}
    found = {}
    for spec in specs:
        suffix = next((suffix for suffix in SUFFIXES if spec.name.endswith(suffix)), "")
        matrix = by_name[spec.name.removesuffix(suffix)]
        kind = SUFFIXES.get(suffix, "numbers")
        found[spec.name] = made(kind, spec.shape, spec.dtype, matrix.dtype, _inner(matrix))
    return found


def _inner(spec: WeightSpec) -> int:
    """K of a packed matrix, including padding; 1 for a vector."""
    return spec.shape[1] * (32 if spec.dtype == "int32" else spec.shape[3]) if len(spec.shape) == 4 else 1


def _random_tensor(kind: PartKind, spec: TensorSpec, numbers: str, k: int, seed: int) -> Array:
    """A vector of ones for a norm's gain, otherwise as `Random.part`."""
    if kind == "numbers" and len(spec.shape) == 1:
        return np.ones(spec.shape, numpy_dtype(spec.dtype))
    return Random(seed).part(kind, spec, numbers, k)
