"""Kernels of random shapes, near the edges of panels, vectors, tiles and blocks, with all checks."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from build.kernels.cuda.binding import GPU
from build.kernels.shapes import Embedding, Linear, Mixture, RollingAttention
from build.kernels.table import CUDA, ON_TENSOR_CORES
from export.weights.format import Storage
from runtime.errors import UserError
from runtime.gpu_check.kernel_cases import case_of
from runtime.gpu_check.report import label_of
from tests.emulator.gpu import Run
from tests.emulator.kernels import EmulatedKernels
from tests.emulator.matrix.rows import Row, rows_of, whole_results
from tests.helpers.kernels import call_of

COUNT = 400
OPS = (*("linear",) * 6, *("rolling_attention",) * 3, "mixture", "mixture", "embedding", "rms_norm", "swiglu", "sample")
CACHES = ("float32", "float16", "float8_e4m3fn", "int8", "uint8")
MOST_WEIGHTS = 2**20  # times rows: what a run takes a second for


def rows(kernels: EmulatedKernels, seed: int = 0) -> Iterator[Row]:
    """Rows of `COUNT` shapes, the same for the same seed."""
    with whole_results():
        yield from _rows(kernels, seed)


def _rows(kernels: EmulatedKernels, seed: int) -> Iterator[Row]:
    for number in range(COUNT):
        rng = np.random.default_rng((seed, number))
        op = str(rng.choice(OPS))
        arguments = MAKERS[op](rng)
        half = bool(rng.random() < 0.7) and op in ON_TENSOR_CORES
        options = {"tensor_cores": half} if op in ON_TENSOR_CORES else {}
        options |= {"warpgroups": bool(rng.random() < 0.5)} if op == "linear" else {}
        call = call_of(op, *arguments)
        case = case_of(call, half=half, seed=number)
        try:
            function = CUDA[op](*arguments, on=GPU, **options)
        except UserError:
            continue  # heads that are too wide
        runs = (Run("random", number, checked=True), Run("random", number, adverse=True))
        label = f"{label_of(call)}{', on tensor cores' if half else ''}"
        yield from rows_of(kernels, f"{op} {seed},{number}", label, kernels.compiled(function), case, runs)


def near(rng: np.random.Generator, *edges: int) -> int:
    """A size beside one of some edges, or any up to the last."""
    if rng.random() < 0.6:
        return max(1, int(rng.choice(edges)) + int(rng.integers(-2, 3)))
    return int(rng.integers(1, max(edges) + 1))


def lead(rng: np.random.Generator) -> tuple[int, int]:
    """One row, a few rows of one token, or tokens of one row."""
    kind = rng.random()
    if kind < 0.35:
        return 1, 1
    return (near(rng, 2, 8, 15), 1) if kind < 0.6 else (1, near(rng, 2, 8, 16, 32, 64, 128))


def storage(rng: np.random.Generator, k: int) -> Storage:
    """How a checkpoint or the project may store a matrix of k columns."""
    dtype = str(rng.choice(["float32", "float16", "int8", "int4", "float8"]))
    if dtype == "int4":
        offsets = str(rng.choice(["none", "zero_points", "minimums"]))
        return Storage(dtype=dtype, group_size=int(rng.choice([32, 64, 128])), offsets=offsets)
    if dtype in ("int8", "float8") and rng.random() < 0.5:
        offsets = str(rng.choice(["none", "zero_points", "minimums"])) if dtype == "int8" else "none"
        return Storage(dtype=dtype, group_size=int(rng.choice([16, 64, 128])), scales="float32", offsets=offsets)
    return Storage(dtype=dtype)


def matrix(rng: np.random.Generator, rows: int) -> tuple[int, int, Storage]:
    """N, K and the storage of a matrix."""
    k = near(rng, 4, 16, 64, 256, 600) if rng.random() < 0.7 else near(rng, 1024, 2048, 4096)
    weight = storage(rng, k)
    if weight.dtype == "int4":
        k = -(-k // weight.group_size) * weight.group_size
    n = near(rng, 8, 32, 64, 128, 256)
    return min(n, max(8, MOST_WEIGHTS // (k * rows))), k, weight


def linear(rng: np.random.Generator) -> Sequence[Any]:
    """A product, and what may be fused with it."""
    shape = lead(rng)
    n, k, weight = matrix(rng, shape[0] * shape[1])
    swiglu, norm = bool(rng.random() < 0.25), 1e-5 if rng.random() < 0.4 else None
    one_of = int(rng.integers(2, 6)) if shape == (1, 1) and norm and not swiglu and rng.random() < 0.3 else None
    residual = not swiglu and one_of is None and bool(rng.random() < 0.3)
    n = 64 * int(rng.integers(1, 5)) if swiglu else n
    return (Linear(shape, n, k, weight, one_of=one_of, norm_eps=norm, swiglu=swiglu, residual=residual),)


def embedding(rng: np.random.Generator) -> Sequence[Any]:
    """Rows of a matrix."""
    shape = lead(rng)
    return (Embedding(shape, *matrix(rng, shape[0] * shape[1])),)


def rolling_attention(rng: np.random.Generator) -> Sequence[Any]:
    """Steps of several rows, or a chunk of one."""
    rows, tokens = (near(rng, 1, 4, 8), 1) if rng.random() < 0.4 else (1, near(rng, 2, 8, 16, 32, 64))
    kv_heads, group, window = int(rng.integers(1, 4)), int(rng.integers(1, 7)), near(rng, 1, 8, 32, 64, 128, 300)
    cache = str(rng.choice(CACHES))
    dim = int(rng.choice([32, 64, 96, 128])) if cache == "uint8" or rng.random() < 0.5 else 2 * near(rng, 4, 8, 40, 80)
    slots, ring_len = int(rng.integers(1, 4)), window + rows * tokens + int(rng.integers(0, 20))
    shape = (rows, tokens, kv_heads * group, kv_heads, dim, slots, window, ring_len, cache, dim**-0.5)
    return (RollingAttention(*shape),)


def mixture(rng: np.random.Generator) -> Sequence[Any]:
    """Experts, of any size and number."""
    dim, hidden_dim = (4 * near(rng, 4, 8, 16, 40) + (1 if rng.random() < 0.3 else 0) for _ in range(2))
    experts = int(rng.integers(2, 10))
    weight = Storage(dtype=str(rng.choice(["float32", "float16", "int8"])))
    return (Mixture(lead(rng), dim, hidden_dim, experts, int(rng.integers(1, min(experts, 4) + 1)), weight),)


MAKERS = {
    "linear": linear,
    "embedding": embedding,
    "rolling_attention": rolling_attention,
    "mixture": mixture,
    "rms_norm": lambda rng: (lead(rng), near(rng, 32, 256, 600, 1024), 1e-5),
    "swiglu": lambda rng: (lead(rng), near(rng, 32, 256, 600)),
    "sample": lambda rng: (near(rng, 32, 256, 1024, 4096, 9000, 33000),),
}
