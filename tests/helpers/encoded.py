"""Random matrices as quantized checkpoints store them."""

import numpy as np

from export.checkpoints.encodings.encoding import EncodedRows
from export.weights.encoded import encoding_of

FINITE_E4M3 = np.array([bits for bits in range(256) if bits & 127 != 127], np.uint8)


def random_rows(encoding, n, k, seed=0):
    """Rows of an encoded matrix whose weights are of about unit size; the order of columns is a random one if any."""
    rng = np.random.default_rng(seed)
    groups = encoding.groups(k)
    numbers = {
        "int4": lambda: rng.integers(0, 16, (n, k), dtype=np.uint8),
        "int8": lambda: rng.integers(-128, 128, (n, k)).astype(np.int8),
        "float8": lambda: rng.choice(FINITE_E4M3, (n, k)),
    }[encoding.numbers]()
    size = {"int4": 8, "int8": 128, "float8": 448}[encoding.numbers]
    scales = _factors(rng, 0.5 / size, 1.5 / size, (n, groups), encoding)
    offsets = {
        "none": lambda: None,
        "zero_points": lambda: rng.integers(0, 16, (n, groups)).astype(numbers.dtype),
        "minimums": lambda: _factors(rng, -1, 0, (n, groups), encoding),
    }[encoding.offsets]()
    order = rng.permutation(k).astype(np.int32) if encoding.order else None
    return EncodedRows(numbers, scales, offsets, order)


def _factors(rng, low, high, shape, encoding):
    """Random scales or minimums: of float16, or products of these and whole numbers of 6 bits, as in K-quants."""
    factors = rng.uniform(low, high, shape).astype(np.float16)
    if encoding.scales == "float16":
        return factors
    return factors.astype(np.float32) * rng.integers(33, 64, shape).astype(np.float32) / 64


def rows_for(stored, n, k, seed=0):
    """Random rows that a storage can carry."""
    encoding = encoding_of(stored)
    rows = random_rows(encoding, n, k, seed)
    if not stored.reordered:
        return rows
    order = np.random.default_rng(seed + 1).permutation(k).astype(np.int32)
    return EncodedRows(rows.numbers, rows.scales, rows.offsets, order)
