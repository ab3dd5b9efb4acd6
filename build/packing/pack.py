"""Weights as stored by the export, rewritten in the kernels' layouts."""

from collections.abc import Iterator
from math import prod
from pathlib import Path

import numpy as np

from build.packing.layout import Array, PackedTensor, packed_tensors
from export.console import byte_bar
from export.onnx_graphs.graphs import GraphsRecord
from runtime.artifact.manifest import TargetKind, WeightSpec
from runtime.artifact.tensor_file import TensorFile, TensorFileWriter

BLOCK_ELEMENTS = 2**24  # packed at a time


def packed(record: GraphsRecord, kind: TargetKind) -> tuple[PackedTensor, ...]:
    """Every tensor of the artifact, in the order in which all compiled functions take them."""
    return tuple(
        part for tensor in record.tensors for part in packed_tensors(tensor, record.model.n_experts or 1, kind)
    )


def packed_weights(record: GraphsRecord, kind: TargetKind) -> tuple[WeightSpec, ...]:
    """How the artifact stores each weight."""
    return tuple(part.spec for part in packed(record, kind))


def pack_weights(source: TensorFile, tensors: tuple[PackedTensor, ...], path: Path, workers: int) -> None:
    """Rewrite the exported weights, a bounded number of bytes in memory at a time."""
    specs = [tensor.spec for tensor in tensors]
    total = sum(prod(spec.shape) * np.dtype(spec.dtype).itemsize for spec in specs)
    with TensorFileWriter(path, specs) as writer, byte_bar("packing weights", total) as bar:
        for tensor in tensors:
            for block in _blocks(source, tensor, workers):
                writer.write(tensor.spec.name, block)
                bar.advance(block.nbytes)


def _blocks(source: TensorFile, tensor: PackedTensor, workers: int) -> Iterator[Array]:
    """One tensor in its layout, some panels at a time."""
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
