"""Rounds in which every contender runs once, with the machine's limits measured before and after each run.

On a shared machine the limits move. Each figure is compared with those beside it, and a run around which they moved is
repeated, or else marked.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from build.bench.contenders import Contender
from build.bench.machine_limits import MachineLimits, best_of, change, medians_of
from build.bench.turns import rotated
from export.console import console
from runtime.bench import Measured

MOVED = 0.15  # the change of a limit that marks a run as disturbed


@dataclass(frozen=True)
class Run:
    """One run of a contender, and the limits before and after it."""

    measured: Measured
    before: MachineLimits
    after: MachineLimits
    disturbed: bool = False

    @property
    def limits(self) -> MachineLimits:
        """What was possible at the time: whatever disturbs a measurement of limits can only lower it."""
        return best_of([self.before, self.after])

    def moved(self, usual: MachineLimits) -> float:
        """The largest change of a limit, from before to after, or from what is usual."""
        pairs = ((self.before, self.after), (self.before, usual), (self.after, usual))
        return max(change(one, other) for one, other in pairs)


@dataclass(frozen=True)
class Outcome:
    """A contender with its runs, one for each round."""

    entry: Contender
    runs: tuple[Run, ...]

    @property
    def disturbed(self) -> int:
        """How many of the runs were disturbed."""
        return sum(run.disturbed for run in self.runs)


@dataclass(frozen=True)
class Machine:
    """How a contender is measured once, how the limits are, and how often a disturbed run is repeated at most."""

    measure: Callable[[Contender], Measured]
    limits: Callable[[], MachineLimits]
    repeats: int


def run_rounds(entries: Sequence[Contender], rounds: int, machine: Machine) -> list[Outcome]:
    """Run each contender once per round, from another one on in each, and mark runs that were disturbed."""
    runs: list[list[Run]] = [[] for _ in entries]
    seen: list[MachineLimits] = []
    for number in range(rounds):
        for i in rotated(range(len(entries)), number * -(-len(entries) // rounds)):
            console.print(f"round {number + 1} of {rounds}: {entries[i].label}", style="dim")
            runs[i].append(_run(entries[i], machine, seen))
    usual = medians_of(seen)
    return [Outcome(entry, tuple(_marked(taken, usual))) for entry, taken in zip(entries, runs, strict=True)]


def _run(entry: Contender, machine: Machine, seen: list[MachineLimits]) -> Run:
    """Run a contender, again if it was disturbed; returns the least disturbed run, and appends the limits to `seen`."""
    runs = []
    for attempt in range(1 + machine.repeats):
        before, measured, after = machine.limits(), machine.measure(entry), machine.limits()
        seen += [before, after]
        run = Run(measured, before, after)
        runs.append(run)
        moved = run.moved(medians_of(seen))
        if moved <= MOVED:
            return run
        console.print(f"a limit moved by {moved:.0%}" + ", again" * (attempt < machine.repeats), style="dim")
    usual = medians_of(seen)
    return min(runs, key=lambda run: run.moved(usual))


def _marked(runs: Iterable[Run], usual: MachineLimits) -> list[Run]:
    return [replace(run, disturbed=run.moved(usual) > MOVED) for run in runs]
