"""The parts of the bench beside the speed of one sequence: sequences side by side, second turns, and speculation."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from rich.table import Table

from build.bench.processes import json_of
from build.bench.sequences import CONTEXTS, COUNTS, run_sequences, sequences_contenders
from build.bench.sequences_report import sequences_tables
from export.console import console
from export.job import Job
from runtime.benchmarks.second_turn import SecondTurnReport
from runtime.benchmarks.sequences import SequencesWorkload
from runtime.benchmarks.speculation import SpeculationReport

NEW_TOKENS = (1, 4, 16, 64, 256)
WINDOW = 256  # of a second artifact, whose rings have wrapped before its second turn
REPEATS = 7  # of second turns, and of each task with and without speculation


@dataclass(frozen=True)
class PartOptions:
    """Rounds of each contender, steps that are timed, and threads."""

    rounds: int
    steps: int
    threads: int


@dataclass(frozen=True)
class PartResult:
    """Tables (of rich, or as text) to print, and all figures for programs to read."""

    tables: Sequence[Table | str]
    figures: Any  # what msgspec encodes


def sequences(job: Job, options: PartOptions) -> PartResult:
    """1 to 16 sequences side by side, beside llama.cpp with as many."""
    workload = SequencesWorkload(COUNTS, CONTEXTS, options.steps, repeats=1)
    samples = run_sequences(sequences_contenders(job, workload, options.threads), options.rounds)
    figures = [{**case._asdict(), "tok_s": tok_s} for case, tok_s in samples.items()]
    return PartResult(sequences_tables(samples), figures)


def second_turn(job: Job, options: PartOptions) -> PartResult:
    """The time to the first token of a second turn, for the config as it is, and with a window that has wrapped."""
    new_tokens = ",".join(map(str, NEW_TOKENS))
    windowed = [f"frontend.overrides={{sliding_window: {WINDOW}}}"]
    reports = {}
    for label, changes in {"as configured": [], f"with a window of {WINDOW}": windowed}.items():
        command = _box_command(_compiled(job, changes), options, "--second-turn", new_tokens)
        reports[label] = msgspec.json.decode(json_of(command, "second turns"), type=SecondTurnReport)
    return PartResult([f"second turn, {label}, {report.table()}" for label, report in reports.items()], reports)


def speculation(job: Job, options: PartOptions) -> PartResult:
    """What speculation gains on a copied text and on free text, with the config as it is."""
    command = _box_command(_compiled(job, []), options, "--speculation")
    report = msgspec.json.decode(json_of(command, "speculation"), type=SpeculationReport)
    return PartResult([f"speculation\n{report.table()}"], report)


PARTS: dict[str, Callable[[Job, PartOptions], PartResult]] = {
    "sequences": sequences,
    "second-turn": second_turn,
    "speculation": speculation,
}


def _compiled(job: Job, changes: Sequence[str]) -> Path:
    """The artifact of the config with these changes."""
    from build.tools.variants import compile_variant  # loads TVM's compiler, which the workers must not

    here = ["backend.cpu=native", *changes]  # it runs here and nowhere else
    return compile_variant(job, "bench-window" if changes else "bench-as-is", here).artifact.folder


def _box_command(artifact: Path, options: PartOptions, *flags: str) -> list[str]:
    console.print(f"measuring {artifact} {flags[0]}", style="dim")
    command = [sys.executable, "-m", "runtime.bench", str(artifact), "--json", "--repeats", str(REPEATS)]
    return [*command, "--threads", str(options.threads), *flags]
