"""`python -m build.bench.kernels`: time the CPU's matrix product by itself, beside what the machine can do at most.

Every level is timed in turns with its limits, in one process: reading memory in the fastest of several ways, and the
peak of the arithmetic that the product uses. The least time of many calls is what counts, since other work on a machine
only ever adds to it; the quartiles show how much. Copies of the weights take turns, so that they come from memory as in
a decode step.
"""

import argparse
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, product
from typing import Any

import numpy as np
from rich.table import Table

from build.bench.formats import FORMATS
from build.bench.probes import READ_BYTES, Probe, best_reader, peak_probes, read_probes
from build.bench.timing import Call, compiled, in_turns, tensor
from build.kernels.cpu.level import Level, runnable_levels
from build.kernels.cpu.limits import peak_of
from build.kernels.cpu.linear import linear
from build.kernels.shapes import Linear
from build.packing.layout import packed_tensors
from export.console import console, output
from export.weights.format import Array, ModelTensor
from export.weights.table import store
from runtime.bench import counts, cpu_name
from runtime.benchmarks.spread import Spread
from runtime.errors import UserError, run_command

ROWS = "1,512"
SIZES = "1024x2048,1024x5632"
FEW_ROWS = 8  # up to which the weights' bytes are compared with the read limit
STORED_ROWS = 64  # outputs whose weights are random; the others repeat them


@dataclass(frozen=True)
class Case:
    """What is timed at every level."""

    format: str
    rows: int
    size: tuple[int, int]  # N, K

    @property
    def shape(self) -> Linear:
        """The product."""
        return Linear((1, self.rows), *self.size, FORMATS[self.format])


@dataclass(frozen=True)
class Timing:
    """The least time of one level's product, the spread of all, and the share that it reaches of its limit."""

    case: Case
    level: str
    least_s: float
    spread: Spread
    limit: str
    rate: float  # GB/s of weights for few rows, else GFLOP/s, in the least time
    limit_rate: float

    @property
    def share(self) -> float:
        """How much of what is possible is reached."""
        return self.rate / self.limit_rate


class Limits:
    """The limits that products are compared with."""

    def __init__(self, levels: Sequence[Level], threads: int) -> None:
        self._widest, self._threads = runnable_levels()[0], threads
        self.reader = best_reader(self._widest, threads)
        self._peaks = {level.name: peak_probes(level, threads) for level in levels}

    def of(self, levels: Sequence[Level], shape: Linear, nbytes: int) -> list[tuple[Probe, int]]:
        """The limit of a product at each level, and how often each multiplication that counts is done.

        Of few rows, that is reading as many bytes as the weights have.
        """
        if shape.rows > FEW_ROWS:
            return [self._peak(level, shape) for level in levels]
        [probe] = read_probes(self._widest, self._threads, [self.reader], nbytes)
        return [(probe, 1)] * len(levels)

    def _peak(self, level: Level, shape: Linear) -> tuple[Probe, int]:
        name, times = peak_of(level, shape.weight, shape.rows)
        return self._peaks[level.name][name], times


def measure(case: Case, levels: Sequence[Level], limits: Limits, seconds: float) -> list[Timing]:
    """Time a case at each level, in turns with the limits that it is compared with, for so many seconds in all."""
    packed, shape = packed_weights(case), case.shape
    nbytes = sum(array.nbytes for array in packed)
    copies = [[tensor(array) for array in packed] for _ in range(max(READ_BYTES // nbytes, 1))]
    turns = count()  # of all levels, so that none finds in a cache what another has read
    calls = [_call(compiled(linear(level, shape), level.processor), shape, copies, turns) for level in levels]
    compared = limits.of(levels, shape, nbytes)
    probes = list(dict.fromkeys(probe for probe, _ in compared))
    samples = in_turns([*calls, *(probe.call for probe in probes)], seconds)
    limit_rates = {probe: probe.rate(min(taken)) for probe, taken in zip(probes, samples[len(levels) :], strict=True)}
    work = nbytes if shape.rows <= FEW_ROWS else 2 * shape.rows * shape.n * shape.k
    return [
        Timing(
            case,
            level.name,
            min(taken),
            Spread.of(taken),
            probe.name,
            work / min(taken) / 1e9,
            limit_rates[probe] / times,
        )
        for level, (probe, times), taken in zip(levels, compared, samples, strict=False)
    ]


def packed_weights(case: Case) -> list[Array]:
    """The arrays of a random matrix, as an artifact holds them."""
    stored, (n, k) = FORMATS[case.format], case.size
    rows = np.random.default_rng(0).standard_normal((STORED_ROWS, k)).astype(np.float32)
    few = store(ModelTensor(name="w", shape=rows.shape, stored=stored), rows)
    arrays = {name: np.concatenate([array] * -(-n // STORED_ROWS))[:n] for name, array in few.items()}
    parts = packed_tensors(ModelTensor(name="w", shape=(n, k), stored=stored), 1, "llvm")
    return [part.pack(arrays[part.spec.name], 1) if part.pack else arrays[part.spec.name] for part in parts]


def _call(kernel: Any, shape: Linear, copies: Sequence[Sequence[Any]], turns: Iterator[int]) -> Call:  # noqa: ANN401
    """A call of a product, with the next copy of the weights each time."""
    x = tensor(np.random.default_rng(1).standard_normal((*shape.x_lead, shape.k)).astype(np.float32))
    y = tensor(np.zeros((*shape.lead, shape.n_out), np.float32))
    return lambda: kernel(x, *copies[next(turns) % len(copies)], y)


def timings_table(timings: Sequence[Timing]) -> Table:
    """One row for each level of each case."""
    table = Table(title="matrix products: least time, quartiles, and share of the limit")
    for name in ("format", "rows", "NxK", "level", "us", "quartiles", "rate", "limit", "share", "of"):
        table.add_column(name, justify="left" if name in ("format", "level", "of") else "right")
    for t in timings:
        few = t.case.rows <= FEW_ROWS
        digits, unit = (1, "GB/s") if few else (0, "GFLOP/s")
        n, k = t.case.size
        table.add_row(
            *(t.case.format, str(t.case.rows), f"{n}x{k}", t.level),
            *(f"{t.least_s * 1e6:,.0f}", f"{t.spread.low * 1e6:,.0f}-{t.spread.high * 1e6:,.0f}"),
            *(f"{t.rate:,.{digits}f} {unit}", f"{t.limit_rate:,.{digits}f}", f"{t.share:.2f}", t.limit),
        )
    return table


def chosen(flag: str, text: str | None, known: Mapping[str, Any]) -> list[Any]:
    """The values that a list such as "a,b" names, or all; raises `UserError` for what is not known."""
    names = list(known) if text is None else text.split(",")
    for name in names:
        if name not in known:
            raise UserError(f"{flag} names {name!r}, expected some of {', '.join(known)}")
    return [known[name] for name in names]


def sizes(text: str) -> list[tuple[int, int]]:
    """Parse a list such as "5632x2048,2048x5632" into pairs of N and K; raises `UserError`."""
    found = [part.split("x") for part in text.split(",")]
    if not all(len(part) == 2 and all(n.isdecimal() and int(n) for n in part) for part in found):
        raise UserError(f"--sizes is {text!r}, expected N and K of each matrix, such as {SIZES}")
    return [(int(n), int(k)) for n, k in found]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, as `python -m build.bench.kernels --help` describes."""
    args = _parser().parse_args(argv)
    if args.threads < 1:
        raise UserError(f"--threads is {args.threads}, expected at least 1")
    levels = chosen("--levels", args.levels, {level.name: level for level in runnable_levels()})
    formats = chosen("--formats", args.formats, {name: name for name in FORMATS})
    cases = [Case(*parts) for parts in product(formats, counts(args.rows), sizes(args.sizes))]
    os.environ["TVM_NUM_THREADS"] = str(args.threads)  # read at the pool's first use
    limits = Limits(levels, args.threads)
    output.print(timings_table(list(_timings(cases, levels, limits, args.seconds))))
    output.print(f"{cpu_name()}, {args.threads} threads; memory is read in: {limits.reader}")
    return 0


def _timings(cases: Sequence[Case], levels: Sequence[Level], limits: Limits, seconds: float) -> Iterator[Timing]:
    for case in cases:
        console.print(f"{case.format}, {case.rows} rows, {case.size[0]} x {case.size[1]}", style="dim")
        yield from measure(case, levels, limits, seconds)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m build.bench.kernels", description="Time the CPU's matrix product beside the machine's limits."
    )
    names = ", ".join(level.name for level in runnable_levels())
    parser.add_argument("--levels", metavar="A,B", help=f"levels of code: {names} (default: all)")
    parser.add_argument("--formats", metavar="A,B", help=f"formats of weights: {', '.join(FORMATS)} (default: all)")
    parser.add_argument("--rows", default=ROWS, metavar="N,N", help="rows of x (default: %(default)s)")
    parser.add_argument("--sizes", default=SIZES, metavar="NxK,NxK", help="of the matrices (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="(default: %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=1.0, metavar="S", help="that each case takes at least (default: %(default)s)"
    )
    return parser


if __name__ == "__main__":
    run_command(main)
