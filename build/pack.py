"""Weights in the kernels' layout. A (N, K) matrix becomes panels (ceil(N / P), K, P): P neighbouring outputs lie together for each step of K.

Worked example, N = 3, K = 2, P = 2:   rows a0 a1 / b0 b1 / c0 c1   become   [[a0 b0], [a1 b1]], [[c0 0], [c1 0]].
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from export.console import byte_bar
from runtime.manifest import WeightSpec
from runtime.tensor_file import TensorFile, TensorFileWriter

Array = NDArray[np.generic]
ROW_MAJOR = "row_major"


def to_panels(matrix: Array, panel: int) -> Array:
    """(N, K) to (ceil(N / panel), K, panel), N padded with zeros."""
    n, k = matrix.shape
    panels = -(-n // panel)
    padded = matrix if n == panels * panel else np.concatenate([matrix, np.zeros((panels * panel - n, k), matrix.dtype)])
    return np.ascontiguousarray(padded.reshape(panels, panel, k).transpose(0, 2, 1))


def from_panels(packed: Array, n: int) -> Array:
    """The inverse of `to_panels`: (panels, K, panel) to (N, K)."""
    panels, k, panel = packed.shape
    return np.ascontiguousarray(packed.transpose(0, 2, 1).reshape(panels * panel, k)[:n])


def pack_weights(source: TensorFile, specs: Sequence[WeightSpec], path: Path, workers: int) -> None:
    """Rewrite the exported weights in the layouts of `specs`; at most `workers` tensors are in memory at once."""

    def pack(spec: WeightSpec) -> Array:
        stored = source.read(spec.name)
        return stored if spec.layout == ROW_MAJOR else to_panels(stored, spec.shape[2])

    total = sum(int(np.prod(spec.shape)) * np.dtype(spec.dtype).itemsize for spec in specs)
    with TensorFileWriter(path, specs) as writer, byte_bar("packing weights", total) as bar, ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(specs), workers):
            batch = specs[start : start + workers]
            for spec, packed in zip(batch, pool.map(pack, batch), strict=True):
                writer.write(spec.name, packed)
                bar.advance(packed.nbytes)
