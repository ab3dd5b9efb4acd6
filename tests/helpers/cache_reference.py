"""How columns of a cache are stored, in numpy, by the dtype of their numbers; e4m3 as its bits."""

import ml_dtypes
import numpy as np


def stored(columns, dtype):
    """Columns (..., head_dim) as the tensors of a cache, in their order; float32 arithmetic, as kernels compute."""
    if dtype == "float8_e4m3fn":
        return [np.clip(columns.astype(np.float32), -448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)]
    if dtype not in ("int8", "uint8"):
        return [columns.astype(dtype)]
    x = columns.astype(np.float32)
    if dtype == "uint8":
        return int4(x)
    scale = (np.abs(x).max(-1, keepdims=True) + np.float32(1e-30)) / np.float32(127)
    return [np.rint(x / scale).astype(np.int8), scale]


def int4(x):
    """Groups of 32 with a float16 scale and minimum; a byte holds numbers i and i + 16 of a group."""
    groups = x.reshape(*x.shape[:-1], -1, 32)
    minimum = groups.min(-1).astype(np.float16)
    low = minimum.astype(np.float32)[..., None]
    step = (groups.max(-1, keepdims=True) - low) / np.float32(15)
    scale = np.maximum(step, np.float32(2**-14)).astype(np.float16)
    with np.errstate(invalid="ignore"):  # padding may be NaN
        levels = np.clip(np.rint((groups - low) / scale.astype(np.float32)), 0, 15).astype(np.uint8)
    return [(levels[..., :16] | levels[..., 16:] << 4).reshape(*x.shape[:-1], -1), scale[..., 0], minimum]


def widened(parts):
    """The numbers that the tensors of a cache stand for, in float64."""
    if parts[0].dtype == np.uint8 and len(parts) == 1:
        return parts[0].view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    if parts[0].dtype == np.uint8:
        pairs, scale, minimum = parts
        levels = pairs.reshape(*scale.shape, 16)
        levels = np.concatenate([levels & 15, levels >> 4], axis=-1).astype(np.float64)
        return (levels * scale[..., None] + minimum[..., None]).reshape(*pairs.shape[:-1], -1)
    numbers, *scales = (part.astype(np.float64) for part in parts)
    return numbers * scales[0] if scales else numbers


BLOCK = 16  # columns that lie together in a CPU's rings


def by_column(parts, side):
    """The tensors (..., columns, width) of a CPU's keys (side 0) or values (1), in the order of their columns.

    Copies, as `build/kernels/cpu/attention/stored_columns.py` describes their layout.
    """
    if len(parts) == 1:
        return [_unblocked(parts[0], BLOCK, 1)] if side == 0 else parts
    numbers = _unblocked(parts[0], *((BLOCK, 2) if side == 0 else (2, 1)))
    return [numbers, *(_unblocked(scale, BLOCK, 1) for scale in parts[1:])]


def _unblocked(x, together, elements):
    """x is (columns / together, width / elements, together, elements) in memory."""
    *lead, columns, width = x.shape
    blocks = x.reshape(*lead, columns // together, width // elements, together, elements)
    return np.moveaxis(blocks, -2, -3).reshape(x.shape)
