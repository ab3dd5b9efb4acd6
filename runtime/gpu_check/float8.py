"""8-bit floats (e4m3: a sign, 4 bits of exponent, 3 of mantissa, no infinities) as their bits, in numpy alone."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
BIAS = 7  # of the exponent
LARGEST = np.float32(448)
SMALLEST_NORMAL = np.float32(2.0 ** (1 - BIAS))


def from_e4m3(bits: Array) -> Array:
    """The numbers, in float64; without NaN."""
    exponent = (bits >> 3 & 15).astype(np.int32)
    magnitude = ((bits & 7) / 8.0 + (exponent > 0)) * 2.0 ** (np.maximum(exponent, 1) - BIAS)
    return np.where(bits >> 7, -magnitude, magnitude)


def to_e4m3(numbers: Array) -> Array:
    """The bits of the nearest numbers, half to even; what is beyond the largest becomes that."""
    size = np.minimum(np.abs(numbers), LARGEST)
    exponent = np.frexp(np.maximum(size, SMALLEST_NORMAL))[1] - 1
    # 8 to 16 of them, or fewer of a subnormal number; the 16th carries into the exponent
    eighths = np.rint(np.ldexp(size, 3 - exponent)).astype(np.int32)
    bits = 8 * (exponent + BIAS - 1) + eighths
    return (bits | np.signbit(numbers) << 7).astype(np.uint8)
