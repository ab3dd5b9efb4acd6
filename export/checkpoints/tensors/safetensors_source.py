"""Reads the tensors of a checkpoint in a safetensors file."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from export.checkpoints.source import Array, SourceTensor, matrix_shape
from runtime.artifact.tensor_file import TensorFile


@dataclass(frozen=True)
class SafetensorsSource:
    """The tensors of one safetensors file."""

    file: TensorFile

    @cached_property
    def tensors(self) -> Mapping[str, SourceTensor]:
        """Every tensor by name."""
        return {
            name: SourceTensor(tensor.shape, tensor.dtype, tensor.nbytes) for name, tensor in self.file.tensors.items()
        }

    def read(self, name: str, rows: slice) -> Array:
        """Rows of one tensor as a matrix, as stored."""
        tensor = self.file.tensors[name]
        matrix = replace(tensor, shape=matrix_shape(tensor.shape))
        return replace(self.file, tensors={name: matrix}).read(name, rows)
