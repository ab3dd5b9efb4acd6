"""`python -m build.bench yaml/x.yaml`: our schemes against onnxruntime on the same graphs, and against llama.cpp on the same weights, in one run.

Compiles the config once for each scheme. Then rounds: each contender in turn, in a process of its own that is gone before the next one starts
(thread pools spin), does the same work; medians over the rounds are compared. The machine's limits are measured between rounds, so that each
figure is a share of what was possible while it was taken. llama.cpp takes part after `make setup BENCH=1`, for GGUF checkpoints.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import msgspec
from rich.table import Table

from build.bench_plot import draw_speeds
from export.config import CompileConfig, load_config
from export.console import console, output
from runtime.bench import Measured, Report, Workload, cpu_name
from runtime.errors import UserError, run_command
from runtime.manifest import Manifest

OURS, ONNXRUNTIME, LLAMA = "ours", "onnxruntime", "llama.cpp"
SCHEMES: dict[str, list[str]] = {  # what is compiled, by what it is called here
    "fp32": ["quantize.scheme=none", "backend.dtype=fp32"],
    "bf16": ["quantize.scheme=none", "backend.dtype=bf16"],
    "fp16": ["quantize.scheme=none", "backend.dtype=fp16"],
    "int8": ["quantize.scheme=int8", "backend.dtype=fp32", "quantize.cache=fp16"],
    "int8_dynamic": ["quantize.scheme=int8_dynamic", "backend.dtype=fp32", "quantize.cache=fp16"],
    "int4": ["quantize.scheme=int4", "backend.dtype=fp32", "quantize.cache=fp16"],
    "int4_dynamic": ["quantize.scheme=int4_dynamic", "backend.dtype=fp32", "quantize.cache=fp16"],
}
RIVAL_SCHEMES = ("fp32", "int8")  # of which onnxruntime runs the graphs
LLAMA_TYPES = ("F32", "F16", "Q8_0", "Q4_0")
RIVAL_PYTHON = Path(".venv-bench/bin/python")  # `make setup BENCH=1`
PROMPT = 512
CONTEXTS = (64, 1024, 4096)
SHORT, LONG = CONTEXTS[0], CONTEXTS[-1]


@dataclass(frozen=True)
class Contender:
    """What runs, what it stores, and the command that measures it once and prints JSON."""

    what: str
    scheme: str
    command: tuple[str, ...]
    compile_s: float | None = None  # of ours, when it was compiled in this run


@dataclass(frozen=True)
class Result:
    """Medians over the rounds: tokens per second of prefill and, by context, of decode; GB/s that decode reads at the short context."""

    what: str
    scheme: str
    prefill_tok_s: float
    ttft_s: float
    decode_tok_s: dict[int, float]
    gb_s: float
    peak_rss_mb: float
    compile_s: float | None = None


@dataclass(frozen=True)
class Limits:
    """What the machine could do while the rounds ran: the best of what was measured between them."""

    read_gb_s: float
    float32_gflop_s: float


@dataclass(frozen=True)
class Goal:
    """A ratio of two figures that the project aims at: ours over a rival's, or over our own."""

    what: str
    ours: tuple[str, str]  # scheme, figure
    other: tuple[str, str, str]  # contender, scheme, figure
    at_least: float


GOALS = (
    Goal("decode fp32 / onnxruntime fp32, same graph", ("fp32", "decode"), (ONNXRUNTIME, "fp32", "decode"), 1.6),
    Goal("decode fp32 / llama.cpp F32", ("fp32", "decode"), (LLAMA, "F32", "decode"), 1.15),
    Goal("decode fp16 / llama.cpp F16", ("fp16", "decode"), (LLAMA, "F16", "decode"), 1.2),
    Goal("decode int8 / llama.cpp Q8_0", ("int8", "decode"), (LLAMA, "Q8_0", "decode"), 1.7),
    Goal("decode int4_dynamic / llama.cpp Q4_0", ("int4_dynamic", "decode"), (LLAMA, "Q4_0", "decode"), 1.8),
    Goal("prefill fp32 / llama.cpp F32", ("fp32", "prefill"), (LLAMA, "F32", "prefill"), 1.3),
    Goal("prefill bf16 / llama.cpp F16", ("bf16", "prefill"), (LLAMA, "F16", "prefill"), 2.5),
    Goal("prefill int8_dynamic / llama.cpp Q8_0", ("int8_dynamic", "prefill"), (LLAMA, "Q8_0", "prefill"), 3.0),
    Goal(f"decode int8 at {LONG} / at {SHORT}", ("int8", "long decode"), (OURS, "int8", "decode"), 0.7),
)


def contenders(config_path: Path, overrides: list[str], config: CompileConfig, args: argparse.Namespace) -> list[Contender]:
    """Compile all schemes; ours and the rivals' runs."""
    from build.compile import exported_graphs  # these load TVM's compiler, which the workers must not
    from build.variants import compile_variant

    workload = msgspec.json.encode(Workload((PROMPT,), CONTEXTS, args.tokens, repeats=1)).decode()
    lists = (",".join(map(str, counts)) for counts in ((PROMPT,), CONTEXTS))
    flags = [*(part for pair in zip(("--prompt-tokens", "--context"), lists, strict=True) for part in pair), "--tokens", str(args.tokens)]
    shape = [] if _windowed(config) else [f"shape.cache_len={max(config.shape.cache_len, LONG + args.tokens + 1)}"]
    ours, theirs = [], []
    for label, sets in SCHEMES.items():
        start = time.monotonic()
        variant = compile_variant(config_path, overrides, f"bench-{label}", [*shape, *sets, "quantize.keep=[]"])
        seconds = time.monotonic() - start
        _check_room(variant.artifact.manifest, args.tokens)
        command = (sys.executable, "-m", "runtime.bench", str(variant.artifact.folder), "--json", "--repeats", "1", *flags)
        ours.append(Contender(OURS, label, (*command, "--threads", str(args.threads)), seconds))
        if label in RIVAL_SCHEMES:
            graphs = exported_graphs(load_config(variant.path), variant.path, [])
            command = (sys.executable, "-m", "build.rival_onnxruntime", str(graphs.folder), workload, str(args.threads))
            theirs.append(Contender(ONNXRUNTIME, label, command))
    if RIVAL_PYTHON.is_file() and config.frontend.checkpoint.suffix == ".gguf":
        base = (str(RIVAL_PYTHON), "-m", "build.rival_llama", str(config.frontend.checkpoint))
        theirs += [Contender(LLAMA, kind, (*base, kind, workload, str(args.threads))) for kind in LLAMA_TYPES]
    else:
        console.print("llama.cpp is left out: it needs `make setup BENCH=1` and a GGUF checkpoint")
    return [*ours, *theirs]


def _windowed(config: CompileConfig) -> bool:
    """Whether the config forces a window on all layers, so that no context is too long."""
    return isinstance(config.frontend.overrides.get("sliding_window"), int)


def _check_room(manifest: Manifest, steps: int) -> None:
    needed, cache_len = SHORT + steps, manifest.shape.cache_len
    if cache_len < needed and not all(manifest.model.sliding_window):
        raise UserError(f"shape.cache_len is {cache_len}, expected at least {needed} to measure in; add --set shape.cache_len={needed}")


def run_rounds(entries: Sequence[Contender], rounds: int, threads: int, cpu: str) -> tuple[list[Result], Limits]:
    """Each contender once a round, in order: medians over the rounds, and the machine's limits, measured before each round."""
    samples: list[list[Measured]] = [[] for _ in entries]
    limits = Limits(0.0, 0.0)
    for number in range(rounds):
        found = measured_limits(threads, cpu)
        limits = Limits(max(limits.read_gb_s, found.read_gb_s), max(limits.float32_gflop_s, found.float32_gflop_s))
        for entry, taken in zip(entries, samples, strict=True):
            console.print(f"round {number + 1} of {rounds}: {entry.what} {entry.scheme}", style="dim")
            taken.append(run_once(entry))
    return [_medians(entry, taken) for entry, taken in zip(entries, samples, strict=True)], limits


def measured_limits(threads: int, cpu: str) -> Limits:
    """`build.limits` in a process of its own."""
    done = subprocess.run([sys.executable, "-m", "build.limits", str(threads), cpu], check=True, stdout=subprocess.PIPE)
    return msgspec.json.decode(done.stdout, type=Limits)


def run_once(entry: Contender) -> Measured:
    """One contender's process, to its end."""
    done = subprocess.run(entry.command, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        raise UserError(f"measuring {entry.what} {entry.scheme} ended with status {done.returncode}; its own message is above")
    if entry.what != OURS:
        return msgspec.json.decode(done.stdout, type=Measured)
    report = msgspec.json.decode(done.stdout, type=Report)
    return Measured(report.speeds, report.peak_rss_mb)


def _medians(entry: Contender, rounds: Sequence[Measured]) -> Result:
    speeds = [r.speeds for r in rounds]
    decode = {d.context: median(s.decode[i].tok_s for s in speeds) for i, d in enumerate(speeds[0].decode)}
    prefill, ttft = (median(getattr(s.prefill[0], name) for s in speeds) for name in ("tok_s", "ttft_s"))
    gb_s, peak = median(s.decode[0].gb_s for s in speeds), median(r.peak_rss_mb for r in rounds)
    return Result(entry.what, entry.scheme, prefill, ttft, decode, gb_s, peak, entry.compile_s)


def ratios(results: Sequence[Result]) -> list[tuple[Goal, float]]:
    """Every goal whose contenders ran, with what was measured."""
    figures: dict[tuple[str, str, str], float] = {}
    for r in results:
        figures[r.what, r.scheme, "prefill"] = r.prefill_tok_s
        figures[r.what, r.scheme, "decode"] = r.decode_tok_s[SHORT]
        if LONG in r.decode_tok_s:
            figures[r.what, r.scheme, "long decode"] = r.decode_tok_s[LONG]
    return [(goal, figures[OURS, *goal.ours] / figures[goal.other]) for goal in GOALS if (OURS, *goal.ours) in figures and goal.other in figures]


def results_table(results: Sequence[Result], limits: Limits, flops: float) -> Table:
    """One row a contender. The share of decode is of the read bandwidth, that of prefill of the float32 peak (`flops`: operations per token)."""
    table = Table(title="medians, tokens per second")
    contexts = [f"decode at {n}" for n in results[0].decode_tok_s]
    for name in ("what", "weights", f"prefill {PROMPT}", "of peak", *contexts, "GB/s", "of read", "peak MB", "compile s"):
        table.add_column(name, justify="left" if name in ("what", "weights") else "right")
    for r in results:
        decode = [f"{speed:,.1f}" for speed in r.decode_tok_s.values()]
        prefill = (f"{r.prefill_tok_s:,.0f}", f"{r.prefill_tok_s * flops / 1e9 / limits.float32_gflop_s:.0%}")
        rest = (f"{r.gb_s:.1f}", f"{r.gb_s / limits.read_gb_s:.0%}", f"{r.peak_rss_mb:,.0f}", "" if r.compile_s is None else f"{r.compile_s:.0f}")
        table.add_row(r.what, r.scheme, *prefill, *decode, *rest)
    return table


def goals_table(measured: Sequence[tuple[Goal, float]]) -> Table:
    """Each ratio beside what the project aims at."""
    table = Table(title="ratios within this run")
    for name in ("ratio", "measured", "goal", ""):
        table.add_column(name, justify="right" if name in ("measured", "goal") else "left")
    for goal, value in measured:
        table.add_row(goal.what, f"{value:.2f}", f"{goal.at_least:.2f}", "reached" if value >= goal.at_least else "missed")
    return table


def flops_per_token(config: CompileConfig) -> float:
    """Multiplications and additions of all matrices, for one token of a prompt; the head, which sees only the last one, is left out."""
    from export.plan import open_configured

    checkpoint = open_configured(config)
    sizes = [checkpoint.shape(name) for name in checkpoint.names() if name.startswith("layers.")]
    return 2.0 * sum(shape[0] * shape[1] for shape in sizes if len(shape) > 1)


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, measure, print, draw, and write the JSON; returns the exit status."""
    args = _parser().parse_args(argv)
    config = load_config(args.config, args.overrides)
    _check(config, args)
    results, limits = run_rounds(contenders(args.config, args.overrides, config, args), args.rounds, args.threads, config.backend.cpu)
    machine = (
        f"{cpu_name()}, {args.threads} threads, reads {limits.read_gb_s:.1f} GB/s, multiplies {limits.float32_gflop_s:.0f} GFLOP/s in float32, "
        f"{datetime.now(UTC):%Y-%m-%d}"
    )
    measured = ratios(results)
    output.print(results_table(results, limits, flops_per_token(config)))
    output.print(goals_table(measured))
    output.print(machine)
    path = args.json or Path("out/bench") / f"{args.config.stem}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, machine, results, limits, measured, {"rounds": args.rounds, "tokens": args.tokens})
    draw_speeds(results, PROMPT, path.with_suffix(".svg"))
    output.print(f"figures and plot: {path}, {path.with_suffix('.svg')}")
    return 0


def write_json(
    path: Path, machine: str, results: Sequence[Result], limits: Limits, measured: Sequence[tuple[Goal, float]], how: Mapping[str, int]
) -> None:
    """All figures, for a program."""
    goals = [{"what": goal.what, "measured": value, "at_least": goal.at_least} for goal, value in measured]
    record = {"machine": machine, "limits": asdict(limits), **how, "results": [asdict(r) for r in results], "ratios": goals}
    path.write_text(json.dumps(record, indent=1) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m build.bench", description="Measure our artifacts against onnxruntime and llama.cpp.")
    parser.add_argument("config", type=Path, help="YAML file, such as yaml/demo.yaml")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="set one value, may be repeated")
    parser.add_argument("--json", type=Path, metavar="PATH", help="where the figures go (default: out/bench/NAME.json)")
    parser.add_argument("--tokens", type=int, default=32, metavar="N", help="decode steps at each context (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="times that each contender runs (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="CPU threads of each (default: all cores)")
    return parser


def _check(config: CompileConfig, args: argparse.Namespace) -> None:
    for flag in ("tokens", "rounds", "threads"):
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag} is {getattr(args, flag)}, expected at least 1")
    if config.backend.target != "llvm":
        raise UserError(f"backend.target is {config.backend.target}, expected llvm, the target whose rival runs here; add --set backend.target=llvm")


if __name__ == "__main__":
    run_command(main)
