"""Packs rows of a matrix into panels with numpy: the steps that make up every format's packing.

The layouts are described in `runtime.artifact.layouts`.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from export.weights.format import Array
from runtime.artifact.layouts import DOT, PAIR, PANEL, VECTOR, WORD


def to_panels(matrix: Array, workers: int = 1) -> Array:
    """Pack (N, K) into (ceil(N / PANEL), K, PANEL), with N padded with zeros; `workers` threads share the panels."""
    n, k = matrix.shape
    whole, rest = divmod(n, PANEL)
    packed = np.zeros((whole + bool(rest), k, PANEL), matrix.dtype)
    if rest:
        packed[whole, :, :rest] = matrix[whole * PANEL :].T

    def fill(start: int, stop: int) -> None:
        packed[start:stop] = matrix[start * PANEL : stop * PANEL].reshape(stop - start, PANEL, k).transpose(0, 2, 1)

    edges = [whole * i // workers for i in range(workers + 1)]
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(fill, edges, edges[1:]))
    return packed


def to_step_panels(matrix: Array, steps: int, workers: int = 1) -> Array:
    """Pack (N, K) into (panels, ceil(K / steps), PANEL, steps): `steps` neighbours in a row side by side.

    The last ones are zero where K is no multiple.
    """
    padded = np.ascontiguousarray(np.pad(matrix, ((0, 0), (0, -matrix.shape[1] % steps))))
    # `steps` numbers together go where single numbers go in `to_panels`.
    packed = to_panels(padded.view(np.dtype((np.void, steps * matrix.itemsize))), workers)
    return packed.reshape(-1).view(matrix.dtype).reshape(*packed.shape, steps)


def to_dot_panels(matrix: Array, workers: int = 1) -> Array:
    """Pack (N, K) int8 into (panels, ceil(K / DOT), PANEL, DOT)."""
    return to_step_panels(matrix, DOT, workers)


def to_pair_panels(matrix: Array, workers: int = 1) -> Array:
    """Pack (N, K) numbers of 16 bits into (panels, ceil(K / PAIR), PANEL, PAIR)."""
    return to_step_panels(matrix, PAIR, workers)


def to_vector_panels(matrix: Array, workers: int = 1) -> Array:
    """Pack (N, K) numbers, or words of a row, into (panels, vectors, PANEL, J): J of them fill VECTOR bytes."""
    return to_step_panels(matrix, VECTOR // matrix.itemsize, workers)


def int4_words(numbers: Array) -> Array:
    """Pack (N, K) numbers from 0 to 15 into int32 (N, K / WORD)."""
    halves = numbers.astype(np.uint8).reshape(len(numbers), -1, 2, WORD // 2)
    words: Array = np.ascontiguousarray(halves[:, :, 0] | halves[:, :, 1] << 4).view(np.int32)[..., 0]
    return words


def panels_of(n: int) -> int:
    """Number of panels for N outputs."""
    return -(-n // PANEL)
