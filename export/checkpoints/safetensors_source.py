"""Reads the tensors of a checkpoint in one or more safetensors files."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from export.checkpoints.source import Array, SourceTensor, matrix_shape
from runtime.artifact.tensor_file import TensorFile


@dataclass(frozen=True)
class SafetensorsSource:
    """The tensors of safetensors files, each file opened once."""

    files: Mapping[str, TensorFile]  # tensor name -> the file that holds it

    @classmethod
    def of(cls, file: TensorFile) -> "SafetensorsSource":
        """All tensors of one file."""
        return cls(dict.fromkeys(file.tensors, file))

    @cached_property
    def tensors(self) -> Mapping[str, SourceTensor]:
        """Every tensor by name."""
        stored = {name: file.tensors[name] for name, file in self.files.items()}
        return {name: SourceTensor(tensor.shape, tensor.dtype, tensor.nbytes) for name, tensor in stored.items()}

    def read(self, name: str, rows: slice) -> Array:
        """Rows of one tensor as a matrix, as stored."""
        file = self.files[name]
        tensor = file.tensors[name]
        matrix = replace(tensor, shape=matrix_shape(tensor.shape))
        return replace(file, tensors={name: matrix}).read(name, rows)
