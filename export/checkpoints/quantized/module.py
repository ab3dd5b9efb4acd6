"""`Module`: the tensors that one quantized matrix is stored in, found by the endings of their names and checked."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from export.checkpoints.source import Array, SourceTensor, TensorSource
from runtime.errors import UserError

FLOATS = ("float16", "bfloat16", "float32")  # of scales
WORDS = ("int32", "uint32")
ALL = slice(None)
ELEMENTS_AT_ONCE = 2**22  # read to take columns out of them


@dataclass(frozen=True)
class Module:
    """The tensors of a source whose names begin alike, such as `model.layers.0.mlp.up_proj`."""

    source: TensorSource
    where: str  # for errors
    name: str

    @property
    def matrix(self) -> str:
        """The plain name of the matrix."""
        return f"{self.name}.weight"

    def of(self, ending: str) -> str:
        """The name of one of the tensors."""
        return f"{self.name}.{ending}"

    def has(self, ending: str) -> bool:
        """Whether the source has a tensor."""
        return self.of(ending) in self.source.tensors

    def present(self, *endings: str) -> tuple[str, ...]:
        """The names of those of some tensors that the source has."""
        return tuple(self.of(ending) for ending in endings if self.has(ending))

    def need(self, ending: str, dtypes: Sequence[str], rank: int = 2) -> tuple[int, ...]:
        """The shape of a tensor; raises `UserError` if it is missing or has another dtype or another number of axes."""
        name = self.of(ending)
        if name not in self.source.tensors:
            raise UserError(
                f"{self.where}: the checkpoint lacks the tensor {name}, without which {self.matrix} has no values; "
                "fetch the checkpoint again"
            )
        tensor = self.source.tensors[name]
        if tensor.dtype not in dtypes or len(tensor.shape) != rank or 0 in tensor.shape:
            self.refuse(ending, tensor, f"{rank} axes and dtype {' or '.join(dtypes)}")
        return tensor.shape

    def check(self, ending: str, dtypes: Sequence[str], shape: tuple[int, ...], reason: str) -> None:
        """Raise `UserError` for a tensor that is missing or has not this shape, for which the error gives a reason."""
        self.need(ending, dtypes, len(shape))
        tensor = self.source.tensors[self.of(ending)]
        if tensor.shape != shape:
            self.refuse(ending, tensor, f"the shape {shape} for {reason}")

    def refuse(self, ending: str, tensor: SourceTensor, expected: str) -> None:
        """Raise `UserError` for a tensor that is not as expected."""
        raise UserError(
            f"{self.where}: the tensor {self.of(ending)} has the shape {tensor.shape} and dtype {tensor.dtype}, "
            f"expected {expected}; fetch the checkpoint again"
        )

    def read(self, ending: str, rows: slice = ALL) -> Array:
        """Rows of one tensor, as stored."""
        return self.source.read(self.of(ending), rows)

    def columns(self, ending: str, start: int, stop: int) -> Array:
        """Columns of a stored matrix, of which no more than some rows are held besides these."""
        rows, width = self.source.tensors[self.of(ending)].shape
        step = max(ELEMENTS_AT_ONCE // width, 1)
        first = self.read(ending, slice(0, min(step, rows)))[:, start:stop]
        result = np.empty((rows, first.shape[1]), first.dtype)
        result[: len(first)] = first
        for row in range(step, rows, step):
            result[row : row + step] = self.read(ending, slice(row, min(row + step, rows)))[:, start:stop]
        return result

    def check_groups(self, columns: int, size: int) -> int:
        """The number of groups in a row; raises `UserError` if groups of this size do not fill it."""
        if size > 0 and columns % size == 0:
            return columns // size
        raise UserError(
            f"{self.where}: the matrix {self.matrix} has {columns} columns in groups of {size}, expected a size that "
            "divides them; fetch the checkpoint again"
        )


def modules(source: TensorSource, where: str, ending: str) -> Iterator[Module]:
    """Every module that has a tensor with this ending."""
    for name in source.tensors:
        if name.endswith(f".{ending}"):
            yield Module(source, where, name.removesuffix(f".{ending}"))


def unpacked(words: Array, bits: int, count: int) -> NDArray[np.uint8]:
    """Numbers (n, count) of a few bits from words or bytes (n, ...), the lowest bits of the first ones first.

    Numbers of 3, 5 or 6 bits may lie across the border of two words.
    """
    packed = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return packed[:, :count]
    if 8 % bits == 0:
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        return ((packed[:, :, None] >> shifts) & np.uint8(2**bits - 1)).reshape(len(packed), -1)[:, :count]
    each = np.unpackbits(packed, axis=1, count=count * bits, bitorder="little").reshape(len(packed), count, bits)
    return np.packbits(each, axis=2, bitorder="little")[:, :, 0]
