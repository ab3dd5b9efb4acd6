"""How columns of a cache are stored, in numpy, by the dtype of their numbers."""

import numpy as np


def stored(columns, dtype):
    """Columns (..., head_dim) as the tensors of a cache, in their order; float32 arithmetic, as kernels compute."""
    if dtype != "int8":
        return [columns.astype(dtype)]
    x = columns.astype(np.float32)
    scale = (np.abs(x).max(-1, keepdims=True) + np.float32(1e-30)) / np.float32(127)
    return [np.rint(x / scale).astype(np.int8), scale]


def widened(parts):
    """The numbers that the tensors of a cache stand for, in float64."""
    numbers, *scales = (part.astype(np.float64) for part in parts)
    return numbers * scales[0] if scales else numbers
