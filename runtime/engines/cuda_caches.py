"""The rings of every slot on a CUDA device (`runtime.engines.loaded_artifact.Caches`)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from runtime.artifact.manifest import TensorSpec
from runtime.artifact.tensor_file import bits_dtype
from runtime.engines.cuda_memory import CudaMemory


class Run(NamedTuple):
    """Adjacent bytes on the device: the first columns of one head in one ring."""

    address: int
    nbytes: int


@dataclass(frozen=True)
class CudaCaches:
    """Rings (slots, n_kv_heads, columns, width), in which each head's columns lie one after the other."""

    memory: CudaMemory
    specs: Sequence[TensorSpec]
    rings: Sequence[Any]  # a tensor for each spec

    def copy(self, source: int, target: int, columns: int) -> None:
        """As `runtime.engines.loaded_artifact.Caches.copy`; calls that are started later find the copy."""
        for run, to in zip(self._runs(source, columns), self._runs(target, columns), strict=True):
            self.memory.on_device(to.address, run.address, run.nbytes)

    def read(self, slot: int, columns: int) -> list[NDArray[Any]]:
        """As `runtime.engines.loaded_artifact.Caches.read`."""
        found = [
            np.empty((heads, min(columns, length), width), bits_dtype(spec.dtype))
            for spec in self.specs
            for _, heads, length, width in (spec.shape,)
        ]
        heads = (head for part in found for head in part)
        self.memory.download(
            (run.address, head) for run, head in zip(self._runs(slot, columns), heads, strict=True) if head.size
        )
        return found

    def write(self, slot: int, columns: Sequence[NDArray[Any]]) -> None:
        """As `runtime.engines.loaded_artifact.Caches.write`."""
        longest = max(part.shape[1] for part in columns)
        heads = (head for part in columns for head in part)
        self.memory.upload(
            ((run.address, head) for run, head in zip(self._runs(slot, longest), heads, strict=True) if head.size),
            lambda _nbytes: None,
        )

    def _runs(self, slot: int, columns: int) -> Iterator[Run]:
        """The first columns of each head of each ring, or all columns of a ring that has fewer."""
        for spec, ring in zip(self.specs, self.rings, strict=True):
            _, heads, length, width = spec.shape
            column = width * bits_dtype(spec.dtype).itemsize
            for head in range(slot * heads, (slot + 1) * heads):
                yield Run(ring.data_ptr() + head * length * column, min(columns, length) * column)
