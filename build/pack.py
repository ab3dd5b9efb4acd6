"""Weights in the kernels' layout. A (N, K) matrix becomes panels (ceil(N / P), K, P): P neighbouring outputs lie together for each step of K.

Worked example, N = 3, K = 2, P = 2:   rows a0 a1 / b0 b1 / c0 c1   become   [[a0 b0], [a1 b1]], [[c0 0], [c1 0]].
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from export.console import byte_bar
from runtime.manifest import WeightSpec
from runtime.tensor_file import TensorFile, TensorFileWriter

Array = NDArray[np.generic]
ROW_MAJOR = "row_major"


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


def from_panels(packed: Array, n: int) -> Array:
    """The inverse of `to_panels`: (panels, K, panel) to (N, K)."""
    panels, k, panel = packed.shape
    return np.ascontiguousarray(packed.transpose(0, 2, 1).reshape(panels * panel, k)[:n])


def pack_weights(source: TensorFile, specs: Sequence[WeightSpec], path: Path, workers: int) -> None:
    """Rewrite the exported weights in the layouts of `specs`, one tensor in memory at a time."""

    def write(spec: WeightSpec) -> None:  # a function, so that its arrays are gone before the next ones come
        stored = source.read(spec.name)
        writer.write(spec.name, stored if spec.layout == ROW_MAJOR else to_panels(stored, spec.shape[2], workers))

    def nbytes(spec: WeightSpec) -> int:
        return prod(spec.shape) * np.dtype(spec.dtype).itemsize

    total = sum(map(nbytes, specs))
    with TensorFileWriter(path, specs) as writer, byte_bar("packing weights", total) as bar:
        for spec in specs:
            write(spec)
            bar.advance(nbytes(spec))
