"""One encoding for several matrices, such as the wq, wk and wv of one tensor, in which each keeps its exact values.

What they differ in is widened: int4 to int8, from which a zero point of 4 bits is subtracted; the dtype of scales; long
groups to shorter ones with equal scales; and a minimum of zero is given to a part that has none.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from math import gcd

import numpy as np

from export.checkpoints.encodings.encoding import MIDDLE, EncodedRows, Encoding, values

# Sizes of groups that kernels take: the powers of two in this range. Whole rows only where there are no offsets, and
# not of int4, whose groups fill at least the 32 numbers that a thread of a GPU loads at once.
SMALLEST_GROUP, LARGEST_GROUP = 16, 256
SMALLEST_OF_INT4 = 32


def joined(encodings: Sequence[Encoding]) -> Encoding | None:
    """The narrowest encoding that kernels take and that holds the values of all matrices; None if there is none."""
    fitting = [_fitting(encoding) for encoding in encodings]
    return reduce(lambda one, other: _joined(one, other), fitting)


def converted(rows: EncodedRows, source: Encoding, target: Encoding) -> EncodedRows:
    """Rows in another encoding, which comes from `joined`."""
    if source == target:
        return rows
    columns = rows.numbers.shape[1]
    widened = source.numbers == "int4" and target.numbers == "int8"
    numbers = values(rows, source).astype(np.int8) if widened else rows.numbers
    given = None if widened and source.offsets == "zero_points" else rows.offsets
    size, shorter = source.group_size or columns, target.group_size or columns
    group = np.arange(target.groups(columns)) * shorter // size  # (target's groups,): the source's group of each
    scales = rows.scales[:, group].astype(target.scales)
    if target.offsets == "none":
        return replace(rows, numbers=numbers, scales=scales, offsets=None)
    dtype = target.scales if target.offsets == "minimums" else numbers.dtype
    absent = MIDDLE if (target.numbers, target.offsets) == ("int4", "zero_points") else 0
    offsets = np.full(scales.shape, absent, dtype) if given is None else given[:, group].astype(dtype)
    return replace(rows, numbers=numbers, scales=scales, offsets=offsets)


def _fitting(encoding: Encoding) -> Encoding | None:
    """The encoding with a size of groups that kernels take, if a shorter one is needed; None if none is possible."""
    if encoding.group_size is None:
        by_rows = encoding.numbers != "int4" and encoding.offsets == "none"
        scales = "float32" if by_rows else encoding.scales
        return replace(encoding, group_size=None if by_rows else LARGEST_GROUP, scales=scales)
    size = gcd(encoding.group_size, LARGEST_GROUP)
    if size < SMALLEST_GROUP:
        return None
    fitting = replace(encoding, group_size=size)
    return _as_int8(fitting) if size < SMALLEST_OF_INT4 else fitting


def _joined(one: Encoding | None, other: Encoding | None) -> Encoding | None:
    if one is None or other is None or one == other:
        return one if one == other else None
    if one.order != other.order or ("float8" in {one.numbers, other.numbers} and one.numbers != other.numbers):
        return None
    offsets = {one.offsets, other.offsets}
    if one.numbers != other.numbers or ("minimums" in offsets and len(offsets) > 1):
        one, other = _as_int8(one), _as_int8(other)
        offsets = {one.offsets, other.offsets}
    if len(offsets - {"none"}) > 1:
        return None
    sizes = [encoding.group_size for encoding in (one, other) if encoding.group_size is not None]
    return replace(
        one,
        group_size=min(sizes, default=None),
        scales="float16" if one.scales == other.scales == "float16" else "float32",
        offsets=next(iter(offsets - {"none"}), "none"),
    )


def _as_int8(encoding: Encoding) -> Encoding:
    if encoding.numbers != "int4":
        return encoding
    return replace(encoding, numbers="int8", offsets="minimums" if encoding.offsets == "minimums" else "none")
