"""Spoils inputs of every reader for as long as one likes, and reports each that gets through.

An input must be refused with one sentence, or be read rightly, within two seconds and half a gigabyte.
"""

import argparse
import os
import shlex
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.live import Live
from rich.table import Table

from export.console import console, output
from runtime.errors import UserError, run_command
from tests.fuzz.reader import Reader, names, open_reader
from tests.fuzz.worker import Outcome, run_cases

# One process, one thread: a forked process has no others, and the limits count the whole process. Libraries read these
# as they are loaded, with the readers.
ONE_THREAD = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
FOUND = Path("out/fuzz")
KEPT = 3  # inputs of each kind of finding that are written
TURN_SECONDS = 2.0  # before the next reader's turn


@dataclass
class Tally:
    """What has come of one reader's cases."""

    cases: int = 0
    accepted: int = 0
    seconds: float = 0.0
    kinds: Counter[str] = field(default_factory=Counter)

    def add(self, outcome: Outcome) -> None:
        """Count one more case."""
        self.cases += 1
        self.accepted += outcome.accepted
        if outcome.kind is not None:
            self.kinds[outcome.kind] += 1

    @property
    def row(self) -> list[str]:
        """The cells of the table beside the reader's name."""
        findings = self.kinds.total()
        refused = self.cases - self.accepted - findings
        rate = f"{self.cases / self.seconds:.0f}" if self.seconds else "-"
        return [*map(str, (self.cases, refused, self.accepted, findings, len(self.kinds))), rate]


class Fuzzer:
    """Readers that take turns, and what has been found so far."""

    def __init__(self, readers: dict[str, Reader]) -> None:
        self.readers = readers
        self.tallies = {name: Tally() for name in readers}

    def turn(self, name: str, cases: Iterable[str], seconds: float = float("inf")) -> int:
        """Run cases of one reader; returns how many."""
        tally, begun = self.tallies[name], time.monotonic()
        before = tally.cases
        for outcome in run_cases(self.readers[name], cases, seconds):
            tally.add(outcome)
            if outcome.kind is not None and tally.kinds[outcome.kind] <= KEPT:
                self._report(name, outcome)
        tally.seconds += time.monotonic() - begun
        return tally.cases - before

    def _report(self, name: str, outcome: Outcome) -> None:
        FOUND.mkdir(parents=True, exist_ok=True)
        path = FOUND / f"{name}-{outcome.case.replace(' ', '_')}"
        path.write_bytes(self.readers[name].input_of(outcome.case))
        console.print(
            f"{name}: {outcome.kind}\n    {outcome.text}\n    {command_of(name, outcome)}", markup=False, soft_wrap=True
        )

    def table(self) -> Table:
        """The state of all readers."""
        table = Table("reader", *("cases", "refused", "accepted", "findings", "kinds", "cases/s"))
        for column in table.columns[1:]:
            column.justify = "right"
        for name, tally in self.tallies.items():
            table.add_row(name, *tally.row)
        return table

    @property
    def findings(self) -> int:
        """How many inputs got through."""
        return sum(tally.kinds.total() for tally in self.tallies.values())


def command_of(name: str, outcome: Outcome) -> str:
    """The command that runs a case again."""
    return f".venv/bin/python -m tests.fuzz --reader {name} --case {shlex.quote(outcome.case)}"


def fuzz_for(fuzzer: Fuzzer, minutes: float, seed: int) -> None:
    """Let the readers take turns: first their known inputs, then numbered ones from `seed` on."""
    end = time.monotonic() + 60 * minutes
    following = dict.fromkeys(fuzzer.readers, seed)
    with Live(fuzzer.table(), console=console, auto_refresh=False) as live:
        for name, reader in fuzzer.readers.items():
            fuzzer.turn(name, reader.known)
            live.update(fuzzer.table(), refresh=True)
        while time.monotonic() < end:
            for name in fuzzer.readers:
                first = following[name]
                cases = [str(case) for case in range(first, first + 10_000)]  # more than a turn has time for
                following[name] += fuzzer.turn(name, cases, min(TURN_SECONDS, max(end - time.monotonic(), 0)))
                live.update(fuzzer.table(), refresh=True)


def fuzz_each(fuzzer: Fuzzer, cases_of: Callable[[Reader], Sequence[str]]) -> None:
    """Run the same number of cases of each reader, whatever time they take."""
    for name, reader in fuzzer.readers.items():
        fuzzer.turn(name, cases_of(reader))


def known_case(reader: Reader, case: str) -> str:
    """The case, if the reader has it; raises `UserError` if not."""
    if not case.isdecimal() and case not in reader.known:
        raise UserError(
            f"--case is {case!r}, expected a number or, with --reader, one of {', '.join(map(repr, reader.known))}"
        )
    return case


def main() -> int:
    """Run the command; 1 if anything was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=5.0, help="for all readers together (default: 5)")
    parser.add_argument("--reader", choices=names(), action="append", help="one of several (default: all)")
    parser.add_argument("--seed", type=int, help="number of the first case (default: another one each time)")
    parser.add_argument("--cases", type=int, help="run the known inputs and this many others of each reader instead")
    parser.add_argument("--case", help="run this case alone: a number, or the name of a known input")
    arguments = parser.parse_args()
    os.environ |= ONE_THREAD
    seed = int(time.time()) * 1000 if arguments.seed is None else arguments.seed
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        fuzzer = Fuzzer({name: open_reader(name, Path(folder)) for name in arguments.reader or names()})
        if arguments.case is not None:
            fuzz_each(fuzzer, lambda reader: [known_case(reader, arguments.case)])
        elif arguments.cases is not None:
            fuzz_each(fuzzer, lambda reader: [*reader.known, *map(str, range(seed, seed + arguments.cases))])
        else:
            fuzz_for(fuzzer, arguments.minutes, seed)
    output.print(fuzzer.table())
    return 1 if fuzzer.findings else 0


if __name__ == "__main__":
    run_command(main)
