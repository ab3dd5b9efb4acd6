"""`QuantizedMatrix`: one quantized matrix under its plain name, and `QuantizedTensors`, a source that offers them."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from export.checkpoints.encodings.encoding import EncodedMatrix, decoded
from export.checkpoints.source import Array, SourceTensor, TensorSource

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class QuantizedMatrix:
    """A matrix (N, K), whose rows can be read as they are stored, as the floats that they mean, or as both."""

    shape: tuple[int, ...]
    packing: str  # such as "GPTQ 4-bit"
    details: str  # what follows the packing when a user is told of it, such as "in groups of 128"
    stored: tuple[str, ...]  # the tensors that it consists of
    floats: Callable[[slice], Float32]  # some of its rows
    encoded: EncodedMatrix | None = None  # None: it cannot be carried as it is


def floats_of(matrix: EncodedMatrix) -> Callable[[slice], Float32]:
    """Reads some rows of a matrix as the floats that its encoding gives."""
    return lambda rows: decoded(matrix.read(rows), matrix.encoding)


@dataclass(frozen=True)
class Found:
    """What one way of storing holds: matrices by their plain names, and tensors that carry nothing for us."""

    matrices: Mapping[str, QuantizedMatrix] = field(default_factory=dict)
    left_out: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class QuantizedTensors:
    """The tensors of a source, with quantized matrices in place of the tensors that they are stored in."""

    source: TensorSource
    found: Found

    @cached_property
    def tensors(self) -> Mapping[str, SourceTensor]:
        """Every tensor by name."""
        stored, matrices = self.source.tensors, self.found.matrices
        parts = {part for matrix in matrices.values() for part in matrix.stored}
        plain = {n: t for n, t in stored.items() if n not in parts and n not in self.found.left_out}
        return plain | {name: self._described(matrix) for name, matrix in matrices.items()}

    def _described(self, matrix: QuantizedMatrix) -> SourceTensor:
        nbytes = sum(self.source.tensors[part].nbytes for part in matrix.stored)
        return SourceTensor(matrix.shape, "float32", nbytes, matrix.encoded, matrix.packing)

    def read(self, name: str, rows: slice) -> Array:
        """Rows of one tensor as a matrix, those of a quantized one as float32."""
        matrix = self.found.matrices.get(name)
        if matrix is None:
            return self.source.read(name, rows)
        with np.errstate(over="ignore", invalid="ignore"):  # reported by `Checkpoint`, with the place
            return matrix.floats(rows)


def notes_on(found: Found) -> tuple[str, ...]:
    """One sentence for each kind of matrices that were found, and on what becomes of those that cannot be carried."""
    kinds = Counter((m.packing, m.details, m.encoded is not None) for m in found.matrices.values())
    return (*(_note(*kind, count) for kind, count in kinds.items()), *found.notes)


def _note(packing: str, details: str, carried: bool, count: int) -> str:
    what = f"{packing} {details}: {count} matri{'x' if count == 1 else 'ces'}"
    if carried:
        return f"{what}, whose numbers and scales quantize.scheme: source keeps as they are"
    return (
        f"{what}, whose values no format here holds; quantize.scheme: source stores them as int8 with a scale for each "
        "row, which moves a number by at most 1/254 of the largest in its row"
    )
