"""Rewrites the weights that export stored in the layouts that the kernels read."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from build.packing.layout import PackedTensor, packed_tensors
from export.console import byte_bar
from export.onnx_graphs.graphs import GraphsRecord
from export.stage import stage_key
from export.weights.format import Array
from runtime.artifact.durable import link_or_copy, write_whole
from runtime.artifact.hashing import file_entry
from runtime.artifact.manifest import WeightSpec
from runtime.artifact.targets import TargetKind
from runtime.artifact.tensor_file import TensorFile, TensorFileWriter

BLOCK_ELEMENTS = 2**24  # elements that are packed at a time
PACKED_FILE = "packed.json"  # in a workspace: the key of the weights in its artifact, and the SHA-256 of their file


def packed(record: GraphsRecord, kind: TargetKind) -> tuple[PackedTensor, ...]:
    """Every tensor of the artifact, in the order in which all compiled functions take them."""
    return tuple(
        part for tensor in record.tensors for part in packed_tensors(tensor, record.model.n_experts or 1, kind)
    )


def packed_weights(record: GraphsRecord, kind: TargetKind) -> tuple[WeightSpec, ...]:
    """How the artifact stores each weight."""
    return tuple(part.spec for part in packed(record, kind))


def packed_key(stored: str, tensors: tuple[PackedTensor, ...]) -> str:
    """Identify packed weights by the key of the `stored` ones, the layout of each tensor, and our code.

    Nothing else about a target matters.
    """
    layouts = [(tensor.spec.name, tensor.spec.layout, tensor.stacked) for tensor in tensors]
    return stage_key({"stored": stored, "layouts": layouts}, "build.packing.pack", ("numpy",))


@dataclass(frozen=True)
class PackedWeights:
    """The weights of an artifact, and where they may exist already: in the artifact that it replaces."""

    source: TensorFile
    tensors: tuple[PackedTensor, ...]
    key: str
    before: Path  # the weight file of the artifact that is replaced
    note: Path  # file with the key and the SHA-256 of those weights, so that a damaged weight file is never reused
    workers: int

    def put(self, path: Path) -> None:
        """Write the weights to `path`, or link the previous ones there if their key and contents match."""
        if self._are_there():
            link_or_copy(self.before, path)
            return
        pack_weights(self.source, self.tensors, path, self.workers)
        write_whole(self.note, json.dumps({"key": self.key, "sha256": file_entry(path).sha256}).encode())

    def _are_there(self) -> bool:
        try:
            noted = json.loads(self.note.read_text())
            return bool(noted["key"] == self.key and noted["sha256"] == file_entry(self.before).sha256)
        except (OSError, ValueError, KeyError, TypeError):
            return False  # there is no note, or the weights that it describes are gone


def pack_weights(source: TensorFile, tensors: tuple[PackedTensor, ...], path: Path, workers: int) -> None:
    """Rewrite the exported weights with a bounded number of bytes in memory at a time."""
    specs = [tensor.spec for tensor in tensors]
    total = sum(prod(spec.shape) * np.dtype(spec.dtype).itemsize for spec in specs)
    with TensorFileWriter(path, specs) as writer, byte_bar("packing weights", total) as bar:
        for tensor in tensors:
            for block in _blocks(source, tensor, workers):
                writer.write(tensor.spec.name, block)
                bar.advance(block.nbytes)


def _blocks(source: TensorFile, tensor: PackedTensor, workers: int) -> Iterator[Array]:
    """Yield one tensor in its layout, some panels at a time."""
    name, pack = tensor.spec.name, tensor.pack
    if pack is None:
        yield source.read(name)
        return
    panel_elements = prod(tensor.spec.shape[1:])
    panel = tensor.spec.shape[2]
    rows = max(BLOCK_ELEMENTS // panel_elements, 1) * panel
    for matrix in range(tensor.stacked):
        for start in range(0, tensor.rows, rows):
            stop = min(start + rows, tensor.rows)
            yield pack(source.read(name, slice(matrix * tensor.rows + start, matrix * tensor.rows + stop)), workers)
