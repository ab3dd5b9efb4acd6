"""Where a stored matrix's numbers lie in the artifact: the contract between packing and kernels. Loads no TVM.

A (N, K) matrix becomes panels: P neighbouring outputs lie together for each step of K, N padded with zeros, so that a kernel reads weights in
order and turns one panel into P sums. Worked example, N = 3, K = 2, P = 2: rows a0 a1 / b0 b1 / c0 c1 become [[a0 b0], [a1 b1]], [[c0 0], [c1 0]].

panels_32     (panels, K, 32)             a number for each output and step; also scales and zero points, a step for each group
panels_32k4   (panels, ceil(K / 4), 32, 4) int8: four steps of an output side by side, as integer dot products take them; K padded with zeros
panels_32q8   (panels, K / 8, 32)         int32: eight 4-bit numbers of an output; byte j holds step j in its lower and step 4 + j in its upper half
...xE         E matrices, each padded by itself, one on the other

On a GPU a thread loads 16 bytes at once, and 32 neighbouring threads, one for each output of a panel, 512 bytes in a row:

panels_32kJ   (panels, ceil(K / J), 32, J)  J steps of an output in 16 bytes: 4 of float32, 8 of float16, 16 of int8; K padded with zeros
panels_32q8k4 (panels, ceil(K / 32), 32, 4) int32: 32 steps of 4 bits in four words as above
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from export.weights.quantize import (
    EXPERTS,
    SCALE_SUFFIX,
    ZERO_POINT_SUFFIX,
    MatrixFormat,
    ModelTensor,
    unpacked_int4,
)
from export.weights.quantize import specs as stored_specs
from runtime.artifact.manifest import DType, TargetKind, WeightSpec

Array = NDArray[np.generic]
PANEL = 32  # outputs: four AVX2 registers, two AVX-512, or the lanes of a warp
DOT = 4  # steps that an integer dot product takes together
WORD = 8  # 4-bit numbers in an int32
VECTOR = 16  # bytes that a GPU's thread loads at once
ROW_MAJOR = "row_major"
RING_BLOCK = 16  # slots of a cache whose keys lie together, so that neighbouring numbers belong to neighbouring slots


def ring_block(cache_len: int) -> int:
    """Slots of a block of a ring of keys: a power of two that divides the ring."""
    return next(n for n in (RING_BLOCK, 8, 4, 2, 1) if cache_len % n == 0)


@dataclass(frozen=True)
class MatrixLayout:
    """Shapes and dtypes of one packed matrix and of what goes with it."""

    name: str  # as the manifest has it
    shape: tuple[int, ...]
    dtype: str
    scales: tuple[tuple[int, ...], str] | None = None
    zero_points: tuple[tuple[int, ...], str] | None = None


def matrix_layout(stored: MatrixFormat, n: int, k: int) -> MatrixLayout:
    """The layout of one (N, K) matrix."""
    panels = -(-n // PANEL)
    if stored.dtype == "int4":
        assert stored.group_size is not None
        groups = (panels, -(-k // stored.group_size), PANEL)
        zeros = (groups, "uint8") if stored.zero_points else None
        return MatrixLayout(f"panels_{PANEL}q{WORD}", (panels, k // WORD, PANEL), "int32", (groups, "float16"), zeros)
    if stored.dtype == "int8" and stored.dynamic:
        return MatrixLayout(f"panels_{PANEL}k{DOT}", (panels, -(-k // DOT), PANEL, DOT), "int8", ((n,), "float32"))
    dtype = (
        "uint16" if stored.dtype == "bfloat16" else stored.dtype
    )  # numpy, which hands weights over, knows no bfloat16
    return MatrixLayout(f"panels_{PANEL}", (panels, k, PANEL), dtype, ((n,), "float32") if stored.scaled else None)


def vector_steps(stored: MatrixFormat) -> int:
    """Steps of K in the 16 bytes that a GPU's thread loads."""
    return VECTOR * 2 if stored.dtype == "int4" else VECTOR // np.dtype(stored.dtype).itemsize


def vector_layout(stored: MatrixFormat, n: int, k: int) -> MatrixLayout:
    """The layout of one (N, K) matrix for a GPU; formats with rounded activations and bfloat16 have none."""
    panels, steps = -(-n // PANEL), vector_steps(stored)
    vectors = -(-k // steps)
    if stored.dtype == "int4":
        assert stored.group_size is not None
        groups = (panels, -(-k // stored.group_size), PANEL)
        zeros = (groups, "uint8") if stored.zero_points else None
        return MatrixLayout(
            f"panels_{PANEL}q{WORD}k{steps // WORD}",
            (panels, vectors, PANEL, steps // WORD),
            "int32",
            (groups, "float16"),
            zeros,
        )
    return MatrixLayout(
        f"panels_{PANEL}k{steps}",
        (panels, vectors, PANEL, steps),
        stored.dtype,
        ((n,), "float32") if stored.scaled else None,
    )


@dataclass(frozen=True)
class PackedTensor:
    """One stored tensor in the artifact, and how some rows of it are packed."""

    spec: WeightSpec
    rows: int  # of one of the stacked matrices, as stored
    stacked: int
    pack: Callable[[Array, int], Array] | None  # rows, workers -> panels; None for row_major


def packed_tensors(tensor: ModelTensor, n_experts: int, kind: TargetKind) -> tuple[PackedTensor, ...]:
    """What an artifact for one kind of target stores of one tensor of the model, in the order in which kernels take it."""
    specs = stored_specs(tensor)
    if len(tensor.shape) == 1:
        return (
            PackedTensor(
                WeightSpec(name=tensor.name, shape=tensor.shape, dtype=specs[0].dtype, layout=ROW_MAJOR),
                tensor.shape[0],
                1,
                None,
            ),
        )
    stacked = n_experts if EXPERTS in tensor.name else 1
    n, k = tensor.shape[0] // stacked, tensor.shape[1]
    layout = (vector_layout if kind == "cuda" else matrix_layout)(tensor.stored, n, k)
    suffix = f"x{stacked}" if stacked > 1 else ""
    shape = (stacked * layout.shape[0], *layout.shape[1:])
    main = WeightSpec(name=tensor.name, shape=shape, dtype=_dtype(layout.dtype), layout=layout.name + suffix)
    found = [PackedTensor(main, n, stacked, (_vector_packer if kind == "cuda" else _packer)(tensor))]
    for part, suffix in ((layout.scales, SCALE_SUFFIX), (layout.zero_points, ZERO_POINT_SUFFIX)):
        if part is not None:
            size, dtype = part
            grouped = len(size) > 1
            spec = WeightSpec(
                name=tensor.name + suffix,
                shape=size if grouped else (stacked * n,),
                dtype=_dtype(dtype),
                layout=f"panels_{PANEL}" if grouped else ROW_MAJOR,
            )
            found.append(PackedTensor(spec, n, stacked, to_panels if grouped else None))
    return tuple(found)


def _dtype(name: str) -> DType:
    return name  # type: ignore[return-value]


def to_panels(matrix: Array, workers: int = 1) -> Array:
    """(N, K) to (ceil(N / PANEL), K, PANEL), N padded with zeros; `workers` threads share the panels."""
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


def to_dot_panels(matrix: Array, workers: int = 1) -> Array:
    """(N, K) int8 to (panels, ceil(K / DOT), PANEL, DOT): whole int32 of DOT steps each go where single numbers go in `to_panels`."""
    padded = np.pad(matrix, ((0, 0), (0, -matrix.shape[1] % DOT)))
    return (
        to_panels(np.ascontiguousarray(padded).view(np.int32), workers)
        .view(np.int8)
        .reshape(-1, padded.shape[1] // DOT, PANEL, DOT)
    )


def to_word_panels(numbers: Array, workers: int = 1) -> Array:
    """(N, K) numbers from 0 to 15 to int32 (panels, K / WORD, PANEL)."""
    return to_panels(int4_words(numbers), workers)


def to_vector_panels(matrix: Array, workers: int = 1) -> Array:
    """(N, K) numbers, or words of a row, to (panels, vectors, PANEL, J): J neighbours of a row fill VECTOR bytes; the rest is zero."""
    steps = VECTOR // matrix.itemsize
    padded = np.ascontiguousarray(np.pad(matrix, ((0, 0), (0, -matrix.shape[1] % steps))))
    vectors = padded.view(np.dtype((np.void, VECTOR)))  # whole vectors go where single numbers go in `to_panels`
    packed = to_panels(vectors, workers)
    return packed.reshape(-1).view(matrix.dtype).reshape(*packed.shape, steps)


def int4_words(numbers: Array) -> Array:
    """(N, K) numbers from 0 to 15 to int32 (N, K / WORD)."""
    halves = numbers.astype(np.uint8).reshape(len(numbers), -1, 2, WORD // 2)
    words: Array = np.ascontiguousarray(halves[:, :, 0] | halves[:, :, 1] << 4).view(np.int32)[..., 0]
    return words


def _vector_packer(tensor: ModelTensor) -> Callable[[Array, int], Array]:
    if tensor.stored.dtype == "int4":
        return lambda rows, workers: to_vector_panels(int4_words(unpacked_int4(tensor, rows)), workers)
    return to_vector_panels


def _packer(tensor: ModelTensor) -> Callable[[Array, int], Array]:
    if tensor.stored.dtype == "int4":
        return lambda rows, workers: to_word_panels(unpacked_int4(tensor, rows), workers)
    if tensor.stored.dtype == "bfloat16":
        return lambda rows, workers: to_panels(rows.view(np.uint16), workers)
    return (
        to_dot_panels
        if tensor.stored.dtype == "int8" and tensor.stored.dynamic and EXPERTS not in tensor.name
        else to_panels
    )
