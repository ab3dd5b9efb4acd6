"""Some or all tensors of a source, under other names."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from export.checkpoints.source import Array, SourceTensor, TensorSource


@dataclass(frozen=True)
class RenamedTensors:
    """The tensors of a source that `originals` names; the others are left out."""

    source: TensorSource
    originals: Mapping[str, str]  # our name -> the source's name

    @cached_property
    def tensors(self) -> Mapping[str, SourceTensor]:
        """Every tensor by its new name."""
        return {name: self.source.tensors[original] for name, original in self.originals.items()}

    def read(self, name: str, rows: slice) -> Array:
        """Rows of one tensor, as the source gives them."""
        return self.source.read(self.originals[name], rows)
