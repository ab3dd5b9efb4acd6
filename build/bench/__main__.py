"""`python -m build.bench yaml/x.yaml`: compare our schemes with other engines on the same weights, in one run.

Compiles the config once for each scheme, and then runs rounds. In a round every contender in turn does the same work,
in its own process, which has ended before the next one starts (thread pools spin); medians over the rounds are
compared. The machine's limits are measured between rounds, so that each figure is a share of what was possible while
it was taken. llama.cpp and ONNX Runtime GenAI take part after `make setup BENCH=1`.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import msgspec

from build.bench.contenders import LLAMA, OURS, RIVAL_SCHEMES, SCHEMES, Contender, Task, contenders
from build.bench.parts import PARTS, PartOptions, PartResult
from build.bench.plot import draw_speeds
from build.bench.processes import json_of
from build.bench.report import CONTEXTS, PROMPT, MachineLimits, Result, goals_table, ratios, results_table, write_json
from build.tools.llama_files import AS_IT_IS
from export.configuration.config import CompileConfig
from export.console import console, output
from export.job import Job
from runtime.artifact.targets import TARGETS
from runtime.bench import BenchReport, Measured, Workload, cpu_name
from runtime.errors import UserError, run_command


def run_rounds(entries: Sequence[Contender], rounds: int, threads: int) -> tuple[list[Result], MachineLimits]:
    """Run each contender once per round, in order.

    Returns medians over the rounds, and the machine's limits, which are measured before each round.
    """
    samples: list[list[Measured]] = [[] for _ in entries]
    limits = MachineLimits(0.0, 0.0)
    for number in range(rounds):
        found = measured_limits(threads)
        limits = MachineLimits(
            max(limits.read_gb_s, found.read_gb_s), max(limits.float32_gflop_s, found.float32_gflop_s)
        )
        for entry, taken in zip(entries, samples, strict=True):
            console.print(f"round {number + 1} of {rounds}: {entry.what} {entry.scheme}", style="dim")
            taken.append(run_once(entry))
    return [_medians(entry, taken) for entry, taken in zip(entries, samples, strict=True)], limits


def measured_limits(threads: int) -> MachineLimits:
    """Run `build.bench.limits` in its own process."""
    done = subprocess.run(
        [sys.executable, "-m", "build.bench.limits", str(threads)], check=True, stdout=subprocess.PIPE
    )
    return msgspec.json.decode(done.stdout, type=MachineLimits)


def run_once(entry: Contender) -> Measured:
    """Run one contender's process to its end; the last line that it prints is JSON."""
    line = json_of(entry.command, f"{entry.what} {entry.scheme}")
    if entry.what != OURS:
        return msgspec.json.decode(line, type=Measured)
    report = msgspec.json.decode(line, type=BenchReport)
    return Measured(report.speeds, report.peak_rss_mb, report.held_mb)


def _medians(entry: Contender, rounds: Sequence[Measured]) -> Result:
    speeds = [r.speeds for r in rounds]
    decode = {d.context: median(s.decode[i].tok_s for s in speeds) for i, d in enumerate(speeds[0].decode)}
    prefill, ttft = (median(getattr(s.prefill[0], name) for s in speeds) for name in ("tok_s", "ttft_s"))
    gb_s, peak = median(s.decode[0].gb_s for s in speeds), median(r.peak_rss_mb for r in rounds)
    return Result(entry.what, entry.scheme, prefill, ttft, decode, gb_s, peak, rounds[0].held_mb, entry.compile_s)


def flops_per_token(config: CompileConfig) -> float:
    """Multiplications and additions of all matrices for one token of a prompt.

    The head, which sees only the last token, is left out.
    """
    from export.results import open_configured

    checkpoint = open_configured(config)
    sizes = [checkpoint.shape(name) for name in checkpoint.names() if name.startswith("layers.")]
    return 2.0 * sum(shape[0] * shape[1] for shape in sizes if len(shape) > 1)


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, measure, print, draw and write the JSON; returns the exit status."""
    args = _parser().parse_args(argv)
    job = Job.load(args.config, args.overrides)
    _check(job.config, args)
    path = args.json or Path("out/bench") / f"{args.config.stem}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    if args.only is None or set(args.only) - set(PARTS):
        _compare_speeds(job, args, path)
    for name, part in PARTS.items():
        if args.only is None or name in args.only:
            _print_part(name, part(job, PartOptions(args.rounds, args.tokens, args.threads)), path)
    output.print(_machine(args.threads))
    return 0


def _machine(threads: int) -> str:
    return f"{cpu_name()}, {threads} threads, {datetime.now(UTC):%Y-%m-%d}"


def _print_part(name: str, result: PartResult, path: Path) -> None:
    """Print a part's tables, and write its figures beside those of the speeds."""
    for table in result.tables:
        output.print(table)
    own = path.with_stem(f"{path.stem}-{name}")
    own.write_bytes(msgspec.json.format(msgspec.json.encode(result.figures), indent=1))
    output.print(f"figures: {own}")


def _compare_speeds(job: Job, args: argparse.Namespace, path: Path) -> None:
    """Compile the schemes, measure each beside its rivals, print, draw and write the JSON."""
    task = Task(Workload((PROMPT,), CONTEXTS, args.tokens, repeats=1), args.threads)
    entries = contenders(job, task, large=not args.no_large and args.only is None, only=args.only)
    results, limits = run_rounds(entries, args.rounds, args.threads)
    machine = (
        f"{_machine(args.threads)}, reads {limits.read_gb_s:.1f} GB/s, "
        f"multiplies {limits.float32_gflop_s:.0f} GFLOP/s in float32"
    )
    measured = ratios(results, limits)
    output.print(results_table(results, limits, flops_per_token(job.config)))
    output.print(goals_table(results, measured))
    output.print(machine)
    write_json(path, machine, results, limits, measured, {"rounds": args.rounds, "tokens": args.tokens})
    draw_speeds(results, PROMPT, path.with_suffix(".svg"))
    output.print(f"figures and plot: {path}, {path.with_suffix('.svg')}")


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
    parser.add_argument(
        "--tokens", type=int, default=32, metavar="N", help="decode steps at each context (default: %(default)s)"
    )
    parser.add_argument(
        "--rounds", type=int, default=3, metavar="N", help="number of runs of each contender (default: %(default)s)"
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="CPU threads of each contender (default: all cores)",
    )
    parser.add_argument(
        "--no-large",
        action="store_true",
        help="leave out the random model of 1.1 B parameters, which takes 5 GB of disk",
    )
    parser.add_argument(
        "--only",
        type=lambda text: tuple(text.split(",")),
        metavar="A,B",
        help=f"measure these alone: parts of the bench ({', '.join(PARTS)}), schemes of ours, and rivals with theirs, "
        f"such as 'source,int8,{LLAMA} {AS_IT_IS}'",
    )
    return parser


def _check(config: CompileConfig, args: argparse.Namespace) -> None:
    known = {*PARTS, *SCHEMES, *(f"{what} {scheme}" for what, schemes in RIVAL_SCHEMES.items() for scheme in schemes)}
    unknown = [scheme for scheme in args.only or () if scheme not in known]
    if unknown:
        raise UserError(f"--only names {unknown[0]!r}, expected some of {', '.join(sorted(known))}")
    for flag in ("tokens", "rounds", "threads"):
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag} is {getattr(args, flag)}, expected at least 1")
    if TARGETS[config.backend.target].on_device:
        raise UserError(
            f"backend.target is {config.backend.target}, expected a target whose rivals run here; "
            "add --set backend.target=llvm"
        )


if __name__ == "__main__":
    run_command(main)
