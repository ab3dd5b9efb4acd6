"""Would a fault be seen? Kernels are spoiled in one place at a time.

A barrier or a wait is taken out, or an index is moved by one. A mutation is `seen` if the emulator reports it, and
`shown` if it does not, but the result is wrong. That a barrier's is neither is wrong: either nobody needs it, or the
emulator is blind. An index may compute the same elsewhere, such as the score that a softmax subtracts from all others.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

from build.kernels.cuda.binding import GPU
from build.kernels.shapes import Linear, Mixture, RollingAttention
from build.kernels.table import CUDA, ON_TENSOR_CORES
from export.weights.format import Storage
from runtime.gpu_check.kernel_case import KernelCase
from runtime.gpu_check.kernel_cases import case_of
from tests.emulator.gpu import Run
from tests.emulator.kernels import EmulatedKernels, Kernel
from tests.emulator.matrix.rows import Row, results, rows_of, whole_results
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
    "few rows, int4": ("linear", Linear((9, 1), 70, 2112, ZEROS)),
    "tensor cores, float16": ("linear", Linear((1, 33), 150, 96, FLOAT16)),
    "tensor cores, int8, SwiGLU": ("linear", Linear((1, 70), 320, 96, INT8, norm_eps=1e-5, swiglu=True)),
    "tensor cores, int4": ("linear", Linear((1, 20), 150, 288, INT4)),
    "warpgroups, float16": ("linear", Linear((1, 40), 150, 640, FLOAT16), {"warpgroups": True}),
    "warpgroups, int4, SwiGLU": ("linear", Linear((1, 24), 256, 1664, ZEROS, swiglu=True), {"warpgroups": True}),
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
# Barriers, waits for copies and for products, and what has to stand in front of products or behind them.
BARRIER = re.compile(
    r"__syncthreads\(\);|tvm_builtin_cuda_mbarrier_wait\(.*\);|tvm_builtin_ptx_(barrier_cluster|wgmma_(?!f16))\w+\(\);"
)
INDEX = re.compile(r"(?<=_ptr\[)(?=\()")  # begins an index that is an expression
MOST_INDICES = 16  # mutated in a kernel, evenly spread over it
ALARM = "*(volatile int *)0"  # an access outside of every allocation
SEEDS = 4  # of the cases that a mutation is tried with
NO_BARRIER, LEFT = "no barrier", "NOT SEEN"


@dataclass(frozen=True)
class Mutation:
    """A place of a source, the text that takes its place, and one that ends the launch as soon as that is computed."""

    name: str
    line: int
    start: int
    end: int
    replacement: str
    alarm: str

    def applied(self, source: str, *, alarm: bool = False) -> str:
        """The source with the replacement, or with the alarm."""
        return source[: self.start] + (self.alarm if alarm else self.replacement) + source[self.end :]


def rows(kernels: EmulatedKernels) -> Iterator[Row]:
    """A row for each mutation."""
    with whole_results():
        for name, (op, *arguments) in KERNELS.items():
            options = arguments.pop() if isinstance(arguments[-1], dict) else {}
            options |= {"tensor_cores": True} if op in ON_TENSOR_CORES else {}
            function = CUDA[op](*arguments, on=GPU, **options)
            half = op in ON_TENSOR_CORES
            cases = [case_of(call_of(op, *arguments), half=half, seed=seed) for seed in range(SEEDS)]
            yield from rows_of(kernels, name, "as it is", kernels.compiled(function), cases[0], [CHECKED])
            for mutation in _mutations(kernels.source):
                outcome = _outcome(kernels, function, mutation, cases)
                ok = outcome != LEFT or mutation.name != NO_BARRIER
                yield Row(name, f"{mutation.name} in line {mutation.line}", "", outcome, ok)


def _mutations(source: str) -> Iterator[Mutation]:
    def all_of(pattern: re.Pattern[str], name: str, replacement: str, alarm: str) -> list[Mutation]:
        return [
            Mutation(name, source.count("\n", 0, match.start()) + 1, *match.span(), replacement, alarm)
            for match in pattern.finditer(source, source.index("__global__"))
        ]

    yield from all_of(BARRIER, NO_BARRIER, ";", f"{ALARM};")
    indices = all_of(INDEX, "index + 1", "1 + ", f"{ALARM} + ")
    yield from indices[:: -(-len(indices) // MOST_INDICES) or 1]


def _outcome(kernels: EmulatedKernels, function: Any, mutation: Mutation, cases: Sequence[KernelCase]) -> str:
    found = _fault(kernels, kernels.compiled(function, mutation.applied), cases)
    if found:
        return found
    reached = _fault(kernels, kernels.compiled(function, partial(mutation.applied, alarm=True)), cases)
    return LEFT if reached else "is in a place that this case does not reach"


def _fault(kernels: EmulatedKernels, kernel: Kernel, cases: Sequence[KernelCase]) -> str | None:
    for case, runs in product(cases, ((CHECKED,), ORDERS)):
        for run, found in results(kernels, kernel, case.arrays, case.compared, runs):
            if isinstance(found, str):
                return f"seen: {found}"
            if not case.error(found) <= 1:
                return f"shown: {case.error(found):.2g} of the bound if it runs {run}"
    return None
