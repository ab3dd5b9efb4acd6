"""`python -m build.bench yaml/x.yaml`: compare our schemes with other engines on the same weights, in one run.

Compiles the config once for each scheme, and then runs rounds. In a round every contender in turn does the same work,
in its own process, which has ended before the next one starts (thread pools spin). The machine's limits are measured
before and after each run, so that each figure is a share of what was possible while it was taken; a run around which
they moved is repeated, or else marked. Ratios are those of figures of the same round. llama.cpp and ONNX Runtime GenAI
take part after `make setup BENCH=1`.
"""

import argparse
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import msgspec
from rich.table import Table

from build.bench.contenders import BEST, LLAMA, OURS, Contender, Task
from build.bench.goals import goals_table, ratios
from build.bench.levels import distinct_levels, kernel_level
from build.bench.line_up import LARGE_LABEL, contenders, known_names
from build.bench.machine_limits import LimitsProcess
from build.bench.parts import PARTS, PartOptions
from build.bench.plot import draw_speeds
from build.bench.processes import json_of
from build.bench.report import decode_table, limits_table, markdown, memory_table, prefill_table, write_json
from build.bench.rounds import MOVED, Machine, run_rounds
from build.tools.llama_files import AS_IT_IS
from export.configuration.config import CompileConfig
from export.console import output
from export.job import Job
from runtime.artifact.targets import TARGETS
from runtime.bench import BenchReport, Measured, Workload, counts, cpu_name
from runtime.errors import UserError, run_command

CONTEXTS, PROMPT, LEVELS = "64,1024,4096", 512, f"{BEST},x86-64-v3"


def run_once(entry: Contender) -> Measured:
    """Run one contender's process to its end; the last line that it prints is JSON."""
    line = json_of(entry.command, entry.label, entry.environment)
    if entry.what != OURS:
        return msgspec.json.decode(line, type=Measured)
    report = msgspec.json.decode(line, type=BenchReport)
    if entry.level not in (BEST, report.cpu_level):
        raise UserError(f"measuring {entry.label}: it ran code for {report.cpu_level}, expected {entry.level}")
    return Measured(report.speeds, report.peak_rss_mb, report.held_mb)


@dataclass(frozen=True)
class Paper:
    """Where everything goes that is printed: to the terminal and, if that is asked for, as Markdown to a file."""

    path: Path | None

    def start(self) -> None:
        """Empty the file."""
        if self.path is not None:
            self.path.write_text("")

    def show(self, what: Table | str) -> None:
        """Print a table, or a line of text."""
        output.print(what)
        if self.path is not None:
            text = markdown(what) if isinstance(what, Table) else _as_it_is(what)
            with self.path.open("a") as file:
                file.write(f"{text}\n\n")


def _as_it_is(text: str) -> str:
    """A line as Markdown, and lines that are aligned as a block of code."""
    return f"```\n{text}\n```" if "\n" in text else text


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, measure, print, draw and write the JSON; returns the exit status."""
    args = _parser().parse_args(argv)
    job = Job.load(args.config, args.overrides)
    _check(job.config, args)
    path = args.json or Path("out/bench") / f"{args.config.stem}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    paper = Paper(args.markdown)
    paper.start()
    if args.only is None or set(args.only) - set(PARTS):
        _compare_speeds(job, args, path, paper)
    for name, part in PARTS.items():
        if args.only is None or name in args.only:
            result = part(job, PartOptions(args.rounds, args.tokens, args.threads))
            for table in result.tables:
                paper.show(table)
            own = path.with_stem(f"{path.stem}-{name}")
            own.write_bytes(msgspec.json.format(msgspec.json.encode(result.figures), indent=1))
            output.print(f"figures: {own}")
    paper.show(_machine(args.threads))
    return 0


def _machine(threads: int) -> str:
    level = kernel_level(BEST)
    processor = level.cpu
    return f"{cpu_name()}, level {level.name} ({processor}), {threads} threads, {datetime.now(UTC):%Y-%m-%d}"


def _compare_speeds(job: Job, args: argparse.Namespace, path: Path, paper: Paper) -> None:
    """Compile the schemes, measure each beside its rivals, print, draw and write the JSON."""
    workload = Workload((args.prompt,), args.contexts, args.tokens, repeats=1)
    task = Task(workload, args.threads, distinct_levels(args.levels))
    entries = contenders(job, task, large=not args.no_large, only=args.only)
    if not entries:
        raise UserError("none of the contenders that --only names can take part")
    levels = dict.fromkeys([kernel_level(BEST).name, *(entry.peak.level for entry in entries if entry.peak)])
    with LimitsProcess(args.threads, list(levels)) as limits:
        outcomes = run_rounds(entries, args.rounds, Machine(run_once, limits.measure, args.again))
    found = ratios(outcomes, args.contexts)
    for table in (
        decode_table(outcomes),
        prefill_table(outcomes, args.prompt),
        memory_table(outcomes),
        goals_table(outcomes, found),
        limits_table(outcomes),
    ):
        paper.show(table)
    paper.show(
        f"Memory is read in {limits.reader}. {args.rounds} rounds, {args.tokens} steps of decode at each context."
    )
    how = {"reader": limits.reader, "rounds": args.rounds, "tokens": args.tokens, "levels": task.levels}
    goals = [{**asdict(ratio), "verdict": ratio.verdict} for ratio in found]
    write_json(path, _machine(args.threads), outcomes, goals, how)
    draw_speeds(outcomes, args.prompt, path.with_suffix(".svg"))
    output.print(f"figures and plot: {path}, {path.with_suffix('.svg')}")


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m build.bench", description="Measure our artifacts against other engines on the same weights."
    )
    parser.add_argument("config", type=Path, help="YAML file, such as yaml/demo.yaml")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="set one value, may be repeated",
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="where the figures go (default: out/bench/NAME.json)")
    parser.add_argument("--markdown", type=Path, metavar="PATH", help="write the tables to a file too, as Markdown")
    parser.add_argument("--prompt", type=int, default=PROMPT, metavar="N", help="tokens (default: %(default)s)")
    parser.add_argument(
        "--contexts", default=CONTEXTS, metavar="N,N", help="tokens before a decode starts (default: %(default)s)"
    )
    parser.add_argument(
        "--tokens", type=int, default=32, metavar="N", help="decode steps at each context (default: %(default)s)"
    )
    parser.add_argument(
        "--rounds", type=int, default=3, metavar="N", help="number of runs of each contender (default: %(default)s)"
    )
    parser.add_argument(
        "--again",
        type=int,
        default=2,
        metavar="N",
        help=f"how often a run is repeated at most if a limit moved by more than {MOVED:.0%}".replace("%", "%%")
        + " (default: %(default)s)",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="CPU threads of each contender (default: all cores)",
    )
    parser.add_argument(
        "--levels",
        type=_names,
        default=_names(LEVELS),
        metavar="A,B",
        help=f"levels of code that ours runs: {BEST}, and LLVM's names of lower ones (default: {LEVELS})",
    )
    parser.add_argument(
        "--no-large",
        action="store_true",
        help="leave out the random model of 1.1 B parameters, which takes many GB of disk",
    )
    parser.add_argument(
        "--only",
        type=_names,
        metavar="A,B",
        help=f"measure these alone: parts of the bench ({', '.join(PARTS)}), schemes of ours, and rivals with theirs, "
        f"such as 'source,int8,{LLAMA} {AS_IT_IS},{LARGE_LABEL} int8'",
    )
    return parser


def _check(config: CompileConfig, args: argparse.Namespace) -> None:
    """Raise `UserError` for flags that ask for what there is not; lists of numbers are parsed."""
    known = {*PARTS, *known_names()}
    unknown = [name for name in args.only or () if name not in known]
    if unknown:
        raise UserError(f"--only names {unknown[0]!r}, expected some of {', '.join(sorted(known))}")
    for flag in ("prompt", "tokens", "rounds", "threads"):
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag} is {getattr(args, flag)}, expected at least 1")
    if args.again < 0:
        raise UserError(f"--again is {args.again}, expected at least 0")
    args.contexts = tuple(sorted(counts(args.contexts)))
    for name in args.levels:
        kernel_level(name)
    if TARGETS[config.backend.target].on_device:
        raise UserError(
            f"backend.target is {config.backend.target}, expected a target whose rivals run here; "
            "add --set backend.target=llvm"
        )


if __name__ == "__main__":
    run_command(main)
