"""One call of a kernel for `runtime.gpucheck`: its inputs, and what it must leave behind."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from runtime.artifact.manifest import TensorSpec
from runtime.artifact.tensor_file import numpy_dtype
from runtime.gpu_check.packed_matrix import Array


@dataclass(frozen=True)
class Expected:
    """The values that a part of one parameter must hold afterwards, and how far they may be off."""

    parameter: int
    part: Callable[[Array], Array]
    values: Array
    bound: Array


@dataclass(frozen=True)
class KernelCase:
    """One call of a kernel: an array for each parameter, which of them are weights and caches, the expected results."""

    arrays: list[Array]
    held: tuple[int, ...]  # parameters that a call reads from memory each time: weights, caches
    output: int  # the parameter that is written completely
    expected: tuple[Expected, ...]

    @property
    def compared(self) -> set[int]:
        """The parameters that are examined afterwards."""
        return {self.output, *(check.parameter for check in self.expected)}

    def error(self, found: Sequence[Array]) -> float:
        """The largest error as a share of its bound; infinite if any number is not finite."""
        if not all(np.isfinite(found[i]).all() for i in self.compared):
            return float("inf")
        return max(
            _share(check.part(found[check.parameter]).astype(np.float64) - check.values, check.bound)
            for check in self.expected
        )


def _share(difference: Array, bound: Array) -> float:
    with np.errstate(over="ignore"):  # any difference is far beyond a bound of zero
        worst = np.abs(difference) / np.maximum(bound, np.finfo(np.float64).tiny)
    return float(worst.max(initial=0.0))


def empty(spec: TensorSpec) -> Array:
    """The content of an output or scratch before it is written: NaN if the dtype has it."""
    dtype = numpy_dtype(spec.dtype)
    return np.full(spec.shape, np.nan if dtype.kind == "f" else -(2**20), dtype)
