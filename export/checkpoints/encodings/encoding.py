"""`Encoding`: how a checkpoint stores a quantized matrix W (N, K), and `EncodedRows`, some rows of one.

The weights of a group, which is some neighbours in a row or a whole row, share a scale and an offset:

offsets        a weight is
none           scale * number, for int4 scale * (number - 8)
zero_points    scale * (number - zero point)
minimums       scale * number + minimum
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from runtime.errors import UserError

Numbers = Literal["int4", "int8", "float8"]
Offsets = Literal["none", "zero_points", "minimums"]
ScaleDType = Literal["float16", "float32"]


@dataclass(frozen=True)
class NumberKind:
    """What is known of one kind of numbers."""

    dtype: str  # of the array that holds them
    middle: int = 0  # the zero point where none is stored
    bits_of: str | None = None  # the float whose bits they are; None: whole numbers
    smallest_group: int = 16  # that kernels take
    by_rows: bool = True  # kernels take a scale for each row, if there are no offsets
    wider: Numbers | None = None  # a kind that holds these numbers, less their zero points, too


# int4: a thread of a GPU loads 32 numbers at once, which fill a group.
NUMBERS: Mapping[Numbers, NumberKind] = {
    "int4": NumberKind("uint8", middle=8, smallest_group=32, by_rows=False, wider="int8"),
    "int8": NumberKind("int8"),
    "float8": NumberKind("uint8", bits_of="float8_e4m3fn"),
}


@dataclass(frozen=True)
class Encoding:
    """What a quantized matrix consists of, apart from its size."""

    numbers: Numbers
    group_size: int | None  # neighbours in a row that share a scale and an offset; None: a whole row
    scales: ScaleDType  # and dtype of minimums
    offsets: Offsets = "none"
    order: str | None = None  # identifies the order of the columns if that is not the matrix's own

    def groups(self, columns: int) -> int:
        """Number of groups in a row; the last one may be shorter than the others."""
        return -(-columns // (self.group_size or columns))


@dataclass(frozen=True)
class EncodedRows:
    """Rows of an encoded matrix.

    numbers  (n, K)       uint8 from 0 to 15 for int4, int8, or uint8 with the bits of e4m3 for float8
    scales   (n, groups)  as `Encoding.scales` says
    offsets  (n, groups)  zero points in the dtype of the numbers, minimums in the dtype of the scales, or None
    order    (K,)         int32: column c as it lies here is column order[c] of the matrix; None: as in the matrix
    """

    numbers: NDArray[Any]
    scales: NDArray[Any]
    offsets: NDArray[Any] | None = None
    order: NDArray[np.int32] | None = None

    def select(self, rows: NDArray[np.int64]) -> "EncodedRows":
        """Some of the rows, in the order that is asked for."""
        offsets = None if self.offsets is None else self.offsets[rows]
        return replace(self, numbers=self.numbers[rows], scales=self.scales[rows], offsets=offsets)


class EncodedMatrix(Protocol):
    """A quantized matrix of a checkpoint, which can be read as it is stored."""

    @property
    def encoding(self) -> Encoding:
        """How it is stored."""

    def read(self, rows: slice) -> EncodedRows:
        """Some of its rows; holds no more than these in memory.

        Raises `UserError` for scales and offsets that are NaN or infinite, with the tensor's name.
        """


def check_finite(rows: EncodedRows, name: str, first: int) -> None:
    """Raise `UserError` for a scale or minimum that is NaN or infinite; `first` is the number of the first row."""
    for what, given in (("scale", rows.scales), ("offset", rows.offsets)):
        bad = None if given is None or given.dtype.kind != "f" else first_row_not_finite(given)
        if bad is not None:
            raise UserError(
                f"the tensor {name} has a{'n' if what == 'offset' else ''} {what} in row {first + bad} that is NaN or "
                "infinite, expected finite numbers; fetch the checkpoint again"
            )


def first_row_not_finite(rows: NDArray[Any]) -> int | None:
    """The index of the first row that holds a NaN or an infinite number; None if there is none."""
    finite = np.isfinite(rows).reshape(len(rows), -1).all(axis=1)
    return None if finite.all() else int(finite.argmin())


def decoded(rows: EncodedRows, encoding: Encoding) -> NDArray[np.float32]:
    """The floats (n, K) that encoded rows mean, with columns in the matrix's own order.

    Computed in float32, with at most one rounding for each operation.
    """
    columns = rows.numbers.shape[1]
    result = values(rows, encoding) * spread(rows.scales, encoding, columns)
    if encoding.offsets == "minimums":
        assert rows.offsets is not None
        result += spread(rows.offsets, encoding, columns)
    if rows.order is None:
        return result
    original = np.empty_like(result)
    original[:, rows.order] = result
    return original


def values(rows: EncodedRows, encoding: Encoding) -> NDArray[np.float32]:
    """The numbers (n, K) less their zero points."""
    kind = NUMBERS[encoding.numbers]
    if kind.bits_of is not None:
        return rows.numbers.view(getattr(ml_dtypes, kind.bits_of)).astype(np.float32)
    numbers: NDArray[np.float32] = rows.numbers.astype(np.float32)
    if encoding.offsets == "zero_points":
        assert rows.offsets is not None
        return numbers - spread(rows.offsets, encoding, numbers.shape[1])
    return numbers - np.float32(kind.middle) if kind.middle and encoding.offsets == "none" else numbers


def spread(of_groups: NDArray[Any], encoding: Encoding, columns: int) -> NDArray[np.float32]:
    """One value for each group (n, groups), repeated for each of its numbers: (n, columns) float32."""
    return np.repeat(of_groups.astype(np.float32), encoding.group_size or columns, axis=1)[:, :columns]
