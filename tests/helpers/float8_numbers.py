"""Numbers at which rounding to 8-bit floats (e4m3) may go wrong, and what torch rounds them to."""

import ml_dtypes
import numpy as np
import torch

FINITE = np.array([b for b in range(256) if b & 127 != 127], np.uint8)  # the bits of every number


def hard_numbers(multiple=1):
    """Every float16, ties between neighbours and what lies next to them, and float32 of any size.

    The first ones come again until their number is a multiple of `multiple`.
    """
    numbers = np.unique(FINITE.view(ml_dtypes.float8_e4m3fn).astype(np.float32))
    ties = (numbers[1:] + numbers[:-1]) / 2  # exact in float32
    beside = [np.nextafter(x, side, dtype=np.float32) for x in (ties, numbers) for side in (-np.inf, np.inf)]
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)
    any_size = np.random.default_rng(0).integers(0, 2**32, 2**14, np.uint32).view(np.float32)
    found = np.concatenate([halves, ties, *beside, any_size])
    return np.resize(found, found.size + -found.size % multiple)


def rounded(x):
    """The bits of the nearest numbers within the largest; NaN stays NaN."""
    return torch.from_numpy(x).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
