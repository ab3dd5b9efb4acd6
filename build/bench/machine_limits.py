"""The machine's limits as a process measures them now and then, beside the contenders."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from types import TracebackType
from typing import Self

import msgspec

from runtime.errors import UserError

PROGRAM = (sys.executable, "-m", "build.bench.limits")


@dataclass(frozen=True)
class Limit:
    """GB/s or GFLOP/s in the fastest of many short calls, and in their median.

    The fastest call is the least disturbed one, so nothing can be faster; the median shows a disturbance.
    """

    best: float
    typical: float


@dataclass(frozen=True)
class MachineLimits:
    """Reading memory, and the peaks of arithmetic by level and name (see `build.kernels.cpu.limits.peaks`)."""

    read: Limit
    peaks: Mapping[str, Mapping[str, Limit]]

    def all(self) -> list[Limit]:
        """Every limit, in the same order each time."""
        return [self.read, *(limit for level in self.peaks.values() for limit in level.values())]


@dataclass(frozen=True)
class Prepared:
    """What the process says before its first measurement: how it reads memory."""

    reader: str


def change(one: MachineLimits, other: MachineLimits) -> float:
    """The largest change of a limit: 0.25 if one of them is a quarter faster in one measurement than in the other."""
    pairs = [(a.typical, b.typical) for a, b in zip(one.all(), other.all(), strict=True)]
    return max(max(pair) / min(pair) - 1 for pair in pairs)


def best_of(found: Sequence[MachineLimits]) -> MachineLimits:
    """The highest of each limit."""
    return _combined(found, max)


def medians_of(found: Sequence[MachineLimits]) -> MachineLimits:
    """The median of each limit."""
    return _combined(found, median)


def _combined(found: Sequence[MachineLimits], combine: Callable[[Sequence[float]], float]) -> MachineLimits:
    def limit(each: Sequence[Limit]) -> Limit:
        return Limit(combine([one.best for one in each]), combine([one.typical for one in each]))

    peaks = {
        level: {name: limit([one.peaks[level][name] for one in found]) for name in names}
        for level, names in found[0].peaks.items()
    }
    return MachineLimits(limit([one.read for one in found]), peaks)


class LimitsProcess:
    """`build.bench.limits` in another process, which sleeps between measurements; a context manager."""

    def __init__(self, threads: int, levels: Sequence[str], program: Sequence[str] = PROGRAM) -> None:
        self._process = subprocess.Popen(
            [*program, ",".join(levels)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "TVM_NUM_THREADS": str(threads)},
        )
        self.reader = msgspec.json.decode(self._line(), type=Prepared).reader

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def measure(self) -> MachineLimits:
        """Measure all limits now, each for `build.bench.limits.SECONDS`."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()
        return msgspec.json.decode(self._line(), type=MachineLimits)

    def _line(self) -> bytes:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._close()
            raise UserError("measuring the machine's limits failed; its own message is above")
        return line

    def _close(self) -> None:
        """End the process, which does so when nothing more can be asked."""
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        self._process.wait()
