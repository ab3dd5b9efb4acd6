"""Weights in the kernels' layout. A (N, K) matrix becomes panels (ceil(N / P), K, P): P neighbouring outputs lie together for each step of K.

Worked example, N = 3, K = 2, P = 2:   rows a0 a1 / b0 b1 / c0 c1   become   [[a0 b0], [a1 b1]], [[c0 0], [c1 0]].
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from export.console import byte_bar
from export.graphs import GraphsRecord
from runtime.manifest import WeightSpec
from runtime.tensor_file import TensorFile, TensorFileWriter

Array = NDArray[np.generic]
ROW_MAJOR = "row_major"
BLOCK_ELEMENTS = 2**24  # packed at a time
PANELS = {"llvm": 32, "cuda": 32}  # of each target's kernels, for those who do not load TVM; a test holds the two equal
EXPERTS = ".experts."  # in the names of weights that stack one matrix for each expert


def to_panels(matrix: Array, panel: int, workers: int = 1) -> Array:
    """(N, K) to (ceil(N / panel), K, panel), N padded with zeros; `workers` threads share the panels."""
    n, k = matrix.shape
    whole, rest = divmod(n, panel)
    packed = np.zeros((whole + bool(rest), k, panel), matrix.dtype)
    if rest:
        packed[whole, :, :rest] = matrix[whole * panel :].T

    def fill(start: int, stop: int) -> None:
        packed[start:stop] = matrix[start * panel : stop * panel].reshape(stop - start, panel, k).transpose(0, 2, 1)

    edges = [whole * i // workers for i in range(workers + 1)]
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(fill, edges, edges[1:]))
    return packed


def from_panels(packed: Array, n: int, stacked: int = 1) -> Array:
    """The inverse of packing: (stacked * panels, K, panel) to (stacked * N, K)."""
    k = packed.shape[1]
    rows = packed.transpose(0, 2, 1).reshape(stacked, -1, k)[:, :n]
    return np.ascontiguousarray(rows).reshape(stacked * n, k)


def panel_layout(shape: tuple[int, ...], panel: int, stacked: int) -> tuple[str, tuple[int, ...]]:
    """Name and shape of the layout of (stacked * N, K): each of the stacked matrices is padded to whole panels by itself."""
    n, k = shape[0] // stacked, shape[1]
    return f"panels_{panel}" + (f"x{stacked}" if stacked > 1 else ""), (stacked * -(-n // panel), k, panel)


def packed_weights(record: GraphsRecord, panel: int) -> tuple[WeightSpec, ...]:
    """How the artifact stores each weight: matrices in panels, vectors as they are."""
    specs = []
    for spec in record.weights:
        stacked = (record.model.n_experts or 1) if EXPERTS in spec.name else 1
        layout, packed = panel_layout(spec.shape, panel, stacked) if len(spec.shape) == 2 else (ROW_MAJOR, spec.shape)
        specs.append(WeightSpec(name=spec.name, shape=packed, dtype=spec.dtype, layout=layout))
    return tuple(specs)


def pack_weights(source: TensorFile, specs: Sequence[WeightSpec], path: Path, workers: int) -> None:
    """Rewrite the exported weights in the layouts of `specs`, a bounded number of bytes in memory at a time."""
    total = sum(prod(spec.shape) * np.dtype(spec.dtype).itemsize for spec in specs)
    with TensorFileWriter(path, specs) as writer, byte_bar("packing weights", total) as bar:
        for spec in specs:
            for block in _blocks(source, spec, workers):
                writer.write(spec.name, block)
                bar.advance(block.nbytes)


def _blocks(source: TensorFile, spec: WeightSpec, workers: int) -> Iterator[Array]:
    """One tensor in its layout, some panels at a time."""
    if spec.layout == ROW_MAJOR:
        yield source.read(spec.name)
        return
    _, k, panel = spec.shape
    stacked = int(spec.layout.partition("x")[2] or 1)
    n = source.tensors[spec.name].shape[0] // stacked
    rows = max(BLOCK_ELEMENTS // (k * panel), 1) * panel
    for matrix in range(stacked):
        for start in range(0, n, rows):
            block = source.read(spec.name, slice(matrix * n + start, matrix * n + min(start + rows, n)))
            yield to_panels(block, panel, workers)
