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
    scales = (rng.uniform(0.5, 1.5, (n, groups)) / size).astype(encoding.scales)
    offsets = {
        "none": lambda: None,
        "zero_points": lambda: rng.integers(0, 16, (n, groups)).astype(numbers.dtype),
        "minimums": lambda: rng.uniform(-1, 0, (n, groups)).astype(encoding.scales),
    }[encoding.offsets]()
    order = rng.permutation(k).astype(np.int32) if encoding.order else None
    return EncodedRows(numbers, scales, offsets, order)


def rows_for(stored, n, k, seed=0):
    """Random rows that a storage can carry."""
    encoding = encoding_of(stored)
    rows = random_rows(encoding, n, k, seed)
    if not stored.reordered:
        return rows
    order = np.random.default_rng(seed + 1).permutation(k).astype(np.int32)
    return EncodedRows(rows.numbers, rows.scales, rows.offsets, order)
