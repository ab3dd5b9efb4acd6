"""One encoding for several matrices, such as the wq, wk and wv of one tensor, in which each keeps its exact values.

What they differ in is widened: int4 to int8, from which a zero point of 4 bits is subtracted; the dtype of scales; long
groups to shorter ones with equal scales; and a minimum of zero is given to a part that has none.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from math import gcd

import numpy as np

from export.checkpoints.encodings.encoding import NUMBERS, EncodedRows, Encoding, Numbers, values

LARGEST_GROUP = 256  # that kernels take; smaller ones are powers of two, down to `NumberKind.smallest_group`


def joined(encodings: Sequence[Encoding]) -> Encoding | None:
    """The narrowest encoding that kernels take and that holds the values of all matrices; None if there is none."""
    fitting = [_fitting(encoding) for encoding in encodings]
    return reduce(lambda one, other: _joined(one, other), fitting)


def converted(rows: EncodedRows, source: Encoding, target: Encoding) -> EncodedRows:
    """Rows in another encoding, which comes from `joined`."""
    if source == target:
        return rows
    columns = rows.numbers.shape[1]
    widened = source.numbers != target.numbers
    numbers = values(rows, source).astype(NUMBERS[target.numbers].dtype) if widened else rows.numbers
    given = None if widened and source.offsets == "zero_points" else rows.offsets
    size, shorter = source.group_size or columns, target.group_size or columns
    group = np.arange(target.groups(columns)) * shorter // size  # (target's groups,): the source's group of each
    scales = rows.scales[:, group].astype(target.scales)
    if target.offsets == "none":
        return replace(rows, numbers=numbers, scales=scales, offsets=None)
    dtype = target.scales if target.offsets == "minimums" else numbers.dtype
    absent = NUMBERS[target.numbers].middle if target.offsets == "zero_points" else 0
    offsets = np.full(scales.shape, absent, dtype) if given is None else given[:, group].astype(dtype)
    return replace(rows, numbers=numbers, scales=scales, offsets=offsets)


def _fitting(encoding: Encoding) -> Encoding | None:
    """The encoding with a size of groups that kernels take, if a shorter one is needed; None if none is possible."""
    kind = NUMBERS[encoding.numbers]
    if encoding.group_size is None and kind.by_rows and encoding.offsets == "none":
        return replace(encoding, scales="float32")
    size = gcd(encoding.group_size or LARGEST_GROUP, LARGEST_GROUP)
    fitting = replace(encoding, group_size=size)
    if size >= kind.smallest_group:
        return fitting
    return None if kind.wider is None else _fitting(_widened(fitting, kind.wider))


def _joined(one: Encoding | None, other: Encoding | None) -> Encoding | None:
    if one is None or other is None or one == other:
        return one if one == other else None
    if one.order != other.order:
        return None
    if one.numbers != other.numbers or ("minimums" in (one.offsets, other.offsets) and one.offsets != other.offsets):
        one, other = (_widened(e, NUMBERS[e.numbers].wider or e.numbers) for e in (one, other))
    if one.numbers != other.numbers:
        return None
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


def _widened(encoding: Encoding, numbers: Numbers) -> Encoding:
    if encoding.numbers == numbers:
        return encoding
    return replace(encoding, numbers=numbers, offsets="minimums" if encoding.offsets == "minimums" else "none")
