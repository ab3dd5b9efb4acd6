"""The numbers of caches, in numpy: random ones, new ones as kernels must store them, and what stored ones mean."""

from collections.abc import Sequence

import numpy as np

from runtime.artifact.caches import CacheFormat
from runtime.artifact.manifest import TensorSpec
from runtime.gpu_check.packed_matrix import Array
from runtime.gpu_check.random_tensors import Random

INT8_LEVELS = np.float32(127)
SMALLEST_PEAK = np.float32(1e-30)  # so that a column of zeros is not divided by zero


def random_part(spec: TensorSpec, random: Random) -> Array:
    """One tensor of a ring, whose numbers are about 1: plain ones, levels of int8, or scales for them."""
    if spec.dtype == "int8":
        return random.whole(spec.shape, -127, 128, "int8")
    if spec.name.endswith("_scales"):
        return random.uniform(spec.shape, 0.005, 0.02, spec.dtype)
    return random.normal(spec.shape, spec.dtype)


def stored(columns: Array, how: CacheFormat) -> list[Array]:
    """The tensors that hold columns (..., head_dim); columns and arithmetic are float32, as in kernels.

    int8: whole multiples of (max |x| + smallest) / levels, rounded half to even.
    """
    if how.scales is None:
        return [columns.astype(how.dtype)]
    scales = (np.abs(columns).max(-1, keepdims=True) + SMALLEST_PEAK) / INT8_LEVELS
    return [np.rint(columns / scales).astype(how.dtype), scales]


def widened(parts: Sequence[Array]) -> Array:
    """The numbers that the tensors of a cache stand for, in float64."""
    numbers, *scales = (part.astype(np.float64) for part in parts)
    return numbers * scales[0] if scales else numbers
