"""Would a fault be seen? Kernels are spoiled in one place at a time.

A barrier is taken out, or an index is moved by one. A mutation is `seen` if the checks report it, and `shown` if they
do not, but the result is wrong or depends on the order of threads.
"""

import re
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from build.kernels.cuda.binding import GPU
from build.kernels.shapes import Linear, Mixture, RollingAttention
from build.kernels.table import CUDA, ON_TENSOR_CORES
from export.weights.format import Storage
from runtime.gpu_check.kernel_case import KernelCase
from runtime.gpu_check.kernel_cases import case_of
from tests.emulator.gpu import Run
from tests.emulator.kernels import EmulatedKernels, Kernel
from tests.emulator.matrix.rows import Row, rows_of
from tests.helpers.kernels import call_of

FLOAT16, INT8 = Storage(dtype="float16"), Storage(dtype="int8")
INT4 = Storage(dtype="int4", group_size=32)
ZEROS = Storage(dtype="int4", group_size=64, offsets="zero_points")


def attention(rows: int, tokens: int, heads: int, dim: int, window: int, ring_len: int) -> RollingAttention:
    """With heads in groups of three or two, on rings of float16."""
    return RollingAttention(rows, tokens, heads, heads // 2, dim, 2, window, ring_len, "float16", 0.125)


KERNELS: Mapping[str, tuple[Any, ...]] = {
    "gemv, float16, norm, SwiGLU": ("linear", Linear((1, 1), 192, 2080, FLOAT16, norm_eps=1e-5, swiglu=True)),
    "gemv, int4, norm, SwiGLU": ("linear", Linear((1, 1), 192, 4160, ZEROS, norm_eps=1e-5, swiglu=True)),
    "gemv, int8, residual": ("linear", Linear((1, 1), 70, 520, INT8, residual=True)),
    "few rows, int8": ("linear", Linear((5, 1), 70, 520, INT8, norm_eps=1e-5)),
    "few rows, int4": ("linear", Linear((9, 1), 70, 512, ZEROS)),
    "tensor cores, float16": ("linear", Linear((1, 33), 150, 96, FLOAT16)),
    "tensor cores, int8, SwiGLU": ("linear", Linear((1, 70), 320, 96, INT8, norm_eps=1e-5, swiglu=True)),
    "tensor cores, int4": ("linear", Linear((1, 20), 150, 96, INT4)),
    "steps": ("rolling_attention", attention(3, 1, 6, 64, 300, 320)),
    "chunk": ("rolling_attention", attention(1, 5, 4, 48, 70, 80)),
    "chunk on tensor cores": ("rolling_attention", attention(1, 33, 4, 64, 200, 240)),
    "sample": ("sample", 3000),
    "mixture, 1 token": ("mixture", Mixture((1, 1), 256, 96, 4, 2, INT8)),
    "mixture, 5 tokens": ("mixture", Mixture((1, 5), 72, 96, 4, 2, FLOAT16)),
    "mixture on tensor cores": ("mixture", Mixture((1, 20), 72, 96, 4, 2, INT8)),
    "rms_norm": ("rms_norm", (1, 3), 600, 1e-5),
}
CHECKED = Run("random", checked=True)
ORDERS = (Run("forward"), Run("reverse"), *(Run("random", seed) for seed in range(6)))
BARRIER = re.compile(r"__syncthreads\(\);")
INDEX = re.compile(r"(?<=_ptr\[)(?=\()")  # begins an index that is an expression
MOST_INDICES = 16  # mutated in a kernel, evenly spread over it


def rows(kernels: EmulatedKernels) -> Iterator[Row]:
    """A row for each mutation."""
    for name, (op, *arguments) in KERNELS.items():
        options = {"tensor_cores": True} if op in ON_TENSOR_CORES else {}
        function = CUDA[op](*arguments, on=GPU, **options)
        case = case_of(call_of(op, *arguments), half=op in ON_TENSOR_CORES)
        yield from rows_of(kernels, name, "as it is", kernels.compiled(function), case, [CHECKED])
        source = kernels.source
        for label, change in _mutations(source):
            kernel = kernels.compiled(function, lambda _source, change=change: change)
            outcome = _outcome(kernels, kernel, case)
            yield Row(name, label, "", outcome, outcome != "LEFT")


def _mutations(source: str) -> Iterator[tuple[str, str]]:
    """What is changed, and the source with that change."""
    kernels = source.index("__global__")
    for match in BARRIER.finditer(source, kernels):
        yield f"no barrier in line {_line(source, match)}", source[: match.start()] + ";" + source[match.end() :]
    found = list(INDEX.finditer(source, kernels))
    for match in islice(found, 0, None, -(-len(found) // MOST_INDICES) or 1):
        yield f"index + 1 in line {_line(source, match)}", source[: match.start()] + "1 + " + source[match.end() :]


def _line(source: str, match: re.Match[str]) -> int:
    return source.count("\n", 0, match.start()) + 1


def _outcome(kernels: EmulatedKernels, kernel: Kernel, case: KernelCase) -> str:
    (row,) = rows_of(kernels, "", "", kernel, case, [CHECKED])
    if not row.ok:
        return "shown: the result is wrong" if re.fullmatch(r"[\d.]+|inf|nan", row.found) else f"seen: {row.found}"
    wrong = [row for row in rows_of(kernels, "", "", kernel, case, ORDERS) if not row.ok]
    return f"shown: {wrong[0].run}: {wrong[0].found}" if wrong else "LEFT"
