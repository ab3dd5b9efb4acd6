"""The numbers of caches, in numpy: random ones, new ones as kernels must store them, and what stored ones mean."""

from collections.abc import Sequence

import numpy as np

from runtime.artifact.caches import FLOAT8, GROUP, HALF, CacheFormat
from runtime.artifact.manifest import TensorSpec
from runtime.gpu_check.float8 import from_e4m3, to_e4m3
from runtime.gpu_check.packed_matrix import Array
from runtime.gpu_check.random_tensors import Random

KEPT, SET = 0x9F, 0x20  # bits of e4m3 that make any others those of a number from 1 / 8 to 15 / 8, or its negative
INT8_LEVELS = np.float32(127)
SMALLEST_PEAK = np.float32(1e-30)  # so that a column of zeros is not divided by zero
INT4_LEVELS = np.float32(15)
SMALLEST_STEP = np.float32(2.0**-14)  # likewise for a group of equal numbers; float16 holds it with all of its bits


def random_part(spec: TensorSpec, how: CacheFormat, random: Random) -> Array:
    """One tensor of a ring whose numbers are about 1: plain numbers, levels, their scales or their minima."""
    if how.dtype == FLOAT8:
        return random.whole(spec.shape, 0, 256, "uint8") & KEPT | SET
    if spec.dtype == "int8":
        return random.whole(spec.shape, -127, 128, "int8")
    if spec.dtype == "uint8":
        return random.whole(spec.shape, 0, 256, "uint8")
    if spec.name.endswith("_scales"):
        low, high = (0.1, 0.3) if spec.dtype == "float16" else (0.005, 0.02)
        return random.uniform(spec.shape, low, high, spec.dtype)
    if spec.name.endswith("_minima"):
        return random.uniform(spec.shape, -2, -1, spec.dtype)
    return random.normal(spec.shape, spec.dtype)


def stored(columns: Array, how: CacheFormat) -> list[Array]:
    """The tensors that hold columns (..., head_dim); columns and arithmetic are float32, as in kernels.

    fp8: the bits of e4m3. int8: whole multiples of (max |x| + smallest) / levels, rounded half to even. int4: for each
    group, levels above its minimum, rounded likewise.
    """
    if how.dtype == FLOAT8:
        return [to_e4m3(columns)]
    if how.scales is None:
        return [columns.astype(how.dtype)]
    if how.group is not None:
        return _grouped(columns)
    scales = (np.abs(columns).max(-1, keepdims=True) + SMALLEST_PEAK) / INT8_LEVELS
    return [np.rint(columns / scales).astype(how.dtype), scales]


def _grouped(columns: Array) -> list[Array]:
    groups = columns.reshape(*columns.shape[:-1], -1, GROUP)
    minima = groups.min(-1, keepdims=True).astype(np.float16)
    above = groups - minima.astype(np.float32)
    scales = np.maximum(above.max(-1, keepdims=True) / INT4_LEVELS, SMALLEST_STEP).astype(np.float16)
    levels = np.clip(np.rint(above / scales.astype(np.float32)), 0, INT4_LEVELS).astype(np.uint8)
    pairs = levels[..., :HALF] | levels[..., HALF:] << 4
    return [pairs.reshape(*columns.shape[:-1], -1), scales[..., 0], minima[..., 0]]


def widened(parts: Sequence[Array], how: CacheFormat) -> tuple[Array, Array]:
    """The numbers that the tensors of a cache stand for, in float64, and the sizes that their rounding is relative to.

    The two differ for int4: a number is the sum of a product and a minimum, either of which may be larger.
    """
    if how.dtype == FLOAT8:
        numbers = from_e4m3(parts[0])
        return numbers, np.abs(numbers)
    if how.group is not None:
        pairs, scales, minima = parts
        halves = pairs.reshape(*scales.shape, HALF)
        products = np.concatenate([halves & 15, halves >> 4], axis=-1) * scales[..., None].astype(np.float64)
        shape = (*pairs.shape[:-1], 2 * pairs.shape[-1])
        return (products + minima[..., None]).reshape(shape), (products + np.abs(minima[..., None])).reshape(shape)
    numbers, *factors = (part.astype(np.float64) for part in parts)
    found = numbers * factors[0] if factors else numbers
    return found, np.abs(found)
