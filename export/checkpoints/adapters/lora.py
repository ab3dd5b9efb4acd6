"""The arithmetic of LoRA: a matrix of the base plus a product of two thin matrices, merged while rows are read.

Sums are those of `merge_and_unload` in peft (`tuners/lora/layer.py`, `get_delta_weight` and `merge`): peft holds an
adapter in float32, multiplies and adds in float32, and rounds once, to the dtype of the base (and the update of an
embedding before that). DoRA (`tuners/lora/variants.py`, `DoraLinearVariant`) also scales rows to norms of its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from export.checkpoints.encodings.encoding import first_row_not_finite
from export.checkpoints.source import Array, SourceTensor, TensorSource
from runtime.artifact.tensor_file import numpy_dtype
from runtime.errors import UserError

ELEMENTS_AT_ONCE = 2**22  # of a merged block: 16 MB as float32
ALL_ROWS = slice(None)


@dataclass(frozen=True)
class LowRank:
    """How one matrix (rows, columns) changes: by `scaling` * up @ down, with down (rank, columns) and up (rows, rank).

    Names are those of the adapter's tensors.
    """

    down: str
    up: str
    scaling: float
    magnitude: str | None = None  # for DoRA: the norm (rows,) that each row of the sum gets
    is_embedding: bool = False  # whether the product is stored transposed: down is (rank, rows), up is (columns, rank)


@dataclass(frozen=True)
class Adapter:
    """An adapter whose headers have been read: the tensors of its base that it changes or replaces, by their names."""

    where: Path
    source: TensorSource
    changes: Mapping[str, LowRank]
    replacements: Mapping[str, str]  # name in the base -> name in the adapter

    def read(self, name: str, rows: slice = ALL_ROWS) -> Array:
        """Rows of one of the adapter's tensors as float32; raises `UserError` for a NaN or an infinite number."""
        found = self.source.read(name, rows).astype(np.float32)
        if first_row_not_finite(found.reshape(len(found), -1)) is not None:
            raise UserError(
                f"{self.where}: the tensor {name} holds a NaN or an infinite number, expected finite numbers; "
                "fetch the adapter again"
            )
        return found


@dataclass(frozen=True)
class AdaptedTensors:
    """The tensors of a base with an adapter merged into them, a bounded number of rows at a time."""

    base: TensorSource
    adapter: Adapter

    @cached_property
    def tensors(self) -> Mapping[str, SourceTensor]:
        """Every tensor by name, with the dtype of the base; what only the adapter has comes as it stores it.

        What the adapter changes is no longer what the base's quantized numbers say.
        """
        added = {
            name: self.adapter.source.tensors[theirs]
            for name, theirs in self.adapter.replacements.items()
            if name not in self.base.tensors
        }
        changed = {
            name: replace(self.base.tensors[name], encoded=None, packing=None)
            for name in (*self.adapter.changes, *self.adapter.replacements)
            if name in self.base.tensors
        }
        return {**self.base.tensors, **changed, **added}

    def read(self, name: str, rows: slice) -> Array:
        """Rows of one tensor as a matrix, changed by the adapter and rounded to the tensor's dtype."""
        change = self.adapter.changes.get(name)
        result = self._unchanged(name, rows)
        if change is None:
            return result
        start = rows.indices(self.tensors[name].shape[0])[0]
        step = max(ELEMENTS_AT_ONCE // result.shape[1], 1)
        for first in range(0, len(result), step):
            block = result[first : first + step]
            at = slice(start + first, start + first + len(block))
            with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # reported below, with its place
                block[...] = _merged(block, self.adapter, change, at).astype(block.dtype)
            bad = first_row_not_finite(block)
            if bad is not None:
                raise UserError(
                    f"the tensor {name}, with the adapter {self.adapter.where} merged, holds a NaN or an infinite "
                    f"number in row {at.start + bad}, expected finite numbers; check that the adapter belongs to "
                    "this base"
                )
        return result

    def _unchanged(self, name: str, rows: slice) -> Array:
        theirs = self.adapter.replacements.get(name)
        if theirs is None:
            return self.base.read(name, rows)
        return self.adapter.read(theirs, rows).astype(numpy_dtype(self.tensors[name].dtype))


def _merged(stored: Array, adapter: Adapter, change: LowRank, at: slice) -> Array:
    """The rows `at` (n, columns) of a changed matrix in float32; `stored` are those of the base."""
    scaling = np.float32(change.scaling)
    if change.is_embedding:
        delta = (adapter.read(change.down)[:, at].T @ adapter.read(change.up).T) * scaling
        return stored.astype(np.float32) + delta.astype(stored.dtype).astype(np.float32)  # peft rounds it on its own
    merged = stored.astype(np.float32) + (adapter.read(change.up, at) @ adapter.read(change.down)) * scaling
    if change.magnitude is None:
        return merged
    return merged * (adapter.read(change.magnitude, at) / np.linalg.norm(merged, axis=1))[:, None]
