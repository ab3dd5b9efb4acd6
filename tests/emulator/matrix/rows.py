"""The table that `python -m tests.emulator` prints: a row for each run of a kernel on the emulated GPU."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

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
    """A row for each run of a kernel on a case."""
    for run, found in results(kernels, kernel, case.arrays, case.compared, runs):
        if isinstance(found, str):
            yield Row(name, label, str(run), found, False)
        else:
            yield Row(name, label, str(run), f"{case.error(found):.2g}", case.error(found) <= 1)


def results(
    kernels: EmulatedKernels, kernel: Kernel, arrays: Sequence[Array], compared: Collection[int], runs: Sequence[Run]
) -> Iterator[tuple[Run, list[Array] | str]]:
    """The arrays after each run, of which some are `compared`, or what is wrong.

    That is what the emulator says, or that the order of threads can be seen in the bits of those that are compared.
    """
    first: dict[bool, bytes] = {}  # bits by whether the code is the checked one, which has no FMAs
    for run in runs:
        try:
            found = kernels.run(kernel, arrays, run)
        except EmulatorError as error:
            yield run, str(error)
            continue
        bits = b"".join(found[i].tobytes() for i in sorted(compared))
        if not run.adverse and first.setdefault(run.checked, bits) != bits:
            yield run, "has other bits than another order of threads"
        yield run, found


@contextmanager
def whole_results() -> Iterator[None]:
    """Let `case_of` compare all of a result, where it would take a sample of a large one."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("kernel_cases.ROWS", "kernel_cases.PANELS", "attention_case.QUERIES"):
            patch.setattr(f"runtime.gpu_check.{name}", 10**9)
        yield
