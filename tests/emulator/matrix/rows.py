"""The table that `python -m tests.emulator` prints: a row for each run of a kernel on the emulated GPU."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from runtime.gpu_check.kernel_case import KernelCase
from tests.emulator.gpu import EmulatorError, Run
from tests.emulator.kernels import Array, EmulatedKernels, Kernel

# Orders of threads, once with all checks, and once with arithmetic as inexact as NVIDIA allows.
RUNS = (
    Run("forward"),
    Run("reverse"),
    Run("random", 1),
    Run("random", 2, checked=True),
    Run("random", 3, adverse=True),
)


@dataclass(frozen=True)
class Row:
    """What became of one run; `found` is its largest error as a share of the bound, or what is wrong."""

    kernel: str
    case: str
    run: str
    found: str
    ok: bool

    def __str__(self) -> str:
        return f"{self.kernel:24} {self.case:56} {self.run:18} {'' if self.ok else 'WRONG '}{self.found}"


def rows_of(
    kernels: EmulatedKernels, name: str, label: str, kernel: Kernel, case: KernelCase, runs: Sequence[Run] = RUNS
) -> Iterator[Row]:
    """A row for each run of a kernel on a case; those that compute alike must give the same bits."""

    def error_of(found: Sequence[Array]) -> float:
        return case.error([array if i in case.compared else case.arrays[i] for i, array in enumerate(found)])

    compared = sorted(case.compared)
    for run, result in results(kernels, kernel, case.arrays, runs, lambda found: [found[i] for i in compared]):
        if isinstance(result, str):
            yield Row(name, label, str(run), result, False)
        else:
            error = error_of(result)
            yield Row(name, label, str(run), f"{error:.3f}", error <= 1)


def results(
    kernels: EmulatedKernels,
    kernel: Kernel,
    arrays: Sequence[Array],
    runs: Sequence[Run],
    compared: Callable[[Sequence[Array]], Sequence[Array]],
) -> Iterator[tuple[Run, list[Array] | str]]:
    """Each run's arrays, or what is wrong: the emulator's words, or bits that depend on the order of threads."""
    first: dict[bool, bytes] = {}  # bits by whether the code is the checked one, which has no FMAs
    for run in runs:
        try:
            found = kernels.run(kernel, arrays, run)
        except EmulatorError as error:
            yield run, str(error)
            continue
        bits = b"".join(array.tobytes() for array in compared(found))
        if not run.adverse and first.setdefault(run.checked, bits) != bits:
            yield run, "has other bits than another order of threads"
        yield run, found
