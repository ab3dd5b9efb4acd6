"""`python -m runtime.bench ARTIFACT`: how fast an artifact runs on this machine, and how close to the memory's limit.

Decode reads every weight once per step, so read bandwidth limits it: the report divides the bytes that a step must read
by the time that it took, and gives the result as a share of the bandwidth measured in the same run. Prompts are random
ids from a fixed seed: speed does not depend on them.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.artifact.build_number import add_minimum_build
from runtime.artifact.cpu import CPUINFO
from runtime.artifact.manifest import Manifest, TensorSpec, WeightSpec
from runtime.artifact.targets import TARGETS
from runtime.artifact.tensor_file import tensor_bytes
from runtime.benchmarks import parts
from runtime.decoding.options import GREEDY
from runtime.decoding.sampler import DrawingModel, Sampler
from runtime.engines.read_bandwidth import METHOD, fresh_read_bandwidth
from runtime.errors import UserError, run_command
from runtime.process_memory import peak_memory

SEED = 0
EMBEDDING, EXPERTS = "tok_embeddings.", ".experts."


class TimedEngine(Protocol):
    """The interface that the measurement needs of an engine with several texts, such as `SideBySide`."""

    @property
    def batch(self) -> int:
        """Texts that advance together."""

    def room(self) -> int | None:
        """How many more ids fit the caches; None without a limit."""

    def reset(self) -> None:
        """Forget every id."""

    def prefill(self, prompts: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Append one list of ids to each text; returns logits (B, vocab) after the last ids."""

    def decode(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Append one id to each text; returns logits (B, vocab)."""


@dataclass(frozen=True)
class Workload:
    """The work to time: prompt lengths, contexts (tokens in the cache when decoding starts), decode steps, repeats."""

    prompt_tokens: tuple[int, ...]
    contexts: tuple[int, ...]
    steps: int
    repeats: int

    @property
    def slots(self) -> int:
        """Slots of a cache that holds all of it, in whole blocks of 64, which every engine reads at full speed."""
        return -(-max((*self.prompt_tokens, *(n + self.steps for n in self.contexts))) // 64) * 64 + 64

    def within(self, room: int | None) -> "Workload":
        """The workload without the lengths that do not fit `room` more tokens."""
        if room is None:
            return self
        prompts = tuple(n for n in self.prompt_tokens if n <= room)
        return Workload(prompts, tuple(n for n in self.contexts if n + self.steps <= room), self.steps, self.repeats)


@dataclass(frozen=True)
class PrefillSpeed:
    """One prompt from empty caches to the first id. Rates count the tokens of all texts."""

    prompt_tokens: int
    ttft_s: float
    tok_s: float


@dataclass(frozen=True)
class DecodeSpeed:
    """Decode steps after a context; `bytes_per_step` counts the weights and the visible cache that a step must read."""

    context: int
    step_s: float
    tok_s: float
    bytes_per_step: int
    gb_s: float


@dataclass(frozen=True)
class Speeds:
    """The measured speeds (medians) and, in `skipped`, why the rest was not measured."""

    prefill: tuple[PrefillSpeed, ...]
    decode: tuple[DecodeSpeed, ...]
    skipped: tuple[str, ...]


@dataclass(frozen=True)
class Measured:
    """The result of one run of one contender.

    Its speeds, the most memory that its process held, and how much of that its weights and caches take.
    """

    speeds: Speeds
    peak_rss_mb: float
    held_mb: float | None = None


@dataclass(frozen=True)
class BenchReport:
    """Everything that the command reports."""

    artifact: str
    model: str
    scheme: str
    dtype: str
    cpu: str
    cpu_level: str | None  # LLVM's name of the processor whose library ran
    threads: int
    load_s: float
    peak_rss_mb: float
    held_mb: float  # the weights, and the caches up to the longest context, that a step reads
    held_where: str  # within the resident memory, or on a GPU
    weight_bytes_per_step: int
    bandwidth_gb_s: float | None  # of this machine's memory; None if another device does the work
    bandwidth_method: str
    speeds: Speeds


def weight_bytes(weights: Iterable[TensorSpec | WeightSpec], *, tied: bool, experts: float = 1.0) -> int:
    """Bytes of weights that a decode step reads.

    A step reads all weights except an embedding table that is not also the head (`tied`), of which it reads one row. Of
    a mixture's weights it reads the share `experts`.
    """
    read = [spec for spec in weights if tied or not spec.name.startswith(EMBEDDING)]
    return round(sum(tensor_bytes(spec) * (experts if EXPERTS in spec.name else 1) for spec in read))


def cache_bytes(caches: Sequence[TensorSpec], windows: Sequence[int], context: int) -> int:
    """Bytes of caches (sequences, n_kv_heads, columns, width) that a token sees after `context` tokens.

    `windows` are the columns that each layer attends over.
    """
    each = len(caches) // len(windows)  # caches of one layer
    return sum(
        tensor_bytes(spec) // (spec.shape[0] * spec.shape[2]) * min(context, windows[i // each])
        for i, spec in enumerate(caches)
    )


def step_bytes_of(manifest: Manifest, rows: int = 1) -> Callable[[int], int]:
    """Bytes that a step of so many sequences must read at a context, as a function: weights, and visible caches."""
    model = manifest.model
    chosen = min(rows * (model.experts_per_token or 1), model.n_experts or 1) / (model.n_experts or 1)
    weights = weight_bytes(manifest.weights, tied=model.tied_embeddings, experts=chosen)
    windows = model.cache_lens(manifest.shape.cache_len)
    return lambda context: weights + rows * cache_bytes(manifest.caches, windows, context)


def measure(engine: TimedEngine, vocab_size: int, workload: Workload, step_bytes: Callable[[int], int]) -> Speeds:
    """Time the workload, all of it in each repeat; `step_bytes` gives the bytes that a step reads at a context."""
    engine.reset()
    fitting = workload.within(engine.room())
    ids = np.random.default_rng(SEED).integers(
        vocab_size, size=(engine.batch, max((*workload.prompt_tokens, *workload.contexts, 1)))
    )
    prefill: dict[int, list[float]] = {n: [] for n in fitting.prompt_tokens}
    decode: dict[int, list[float]] = {n: [] for n in fitting.contexts}
    if fitting.prompt_tokens:  # warm-up: the first touch of code and weights is not counted
        _first_token_seconds(engine, ids[:, : min(fitting.prompt_tokens)])
    if fitting.contexts:
        _step_seconds(engine, ids[:, : min(fitting.contexts)], 1)
    for _ in range(fitting.repeats):
        for n, samples in prefill.items():
            samples.append(_first_token_seconds(engine, ids[:, :n]))
        for n, samples in decode.items():
            samples.append(_step_seconds(engine, ids[:, :n], fitting.steps))
    engine.reset()
    return Speeds(
        tuple(PrefillSpeed(n, median(s), engine.batch * n / median(s)) for n, s in prefill.items()),
        tuple(_decode_speed(n, median(s), engine.batch, step_bytes(n + fitting.steps // 2)) for n, s in decode.items()),
        _skipped(workload, fitting, engine.room()),
    )


def _first_token_seconds(engine: TimedEngine, ids: NDArray[np.int64]) -> float:
    prompts = ids.tolist()
    engine.reset()
    start = time.perf_counter()
    engine.prefill(prompts).argmax(-1)
    return time.perf_counter() - start


def _step_seconds(engine: TimedEngine, context: NDArray[np.int64], steps: int) -> float:
    """Mean seconds of a greedy decode step after a context."""
    engine.reset()
    chosen = engine.prefill(context.tolist()).argmax(-1)
    start = time.perf_counter()
    if isinstance(engine, DrawingModel) and engine.can_draw(GREEDY):
        for _ in engine.draw(int(chosen[0]), Sampler(GREEDY), steps):
            pass
    else:
        for _ in range(steps):
            chosen = engine.decode(chosen.tolist()).argmax(-1)
    return (time.perf_counter() - start) / steps


def _decode_speed(context: int, step_s: float, batch: int, nbytes: int) -> DecodeSpeed:
    return DecodeSpeed(context, step_s, batch / step_s, nbytes, nbytes / step_s / 1e9)


def _skipped(asked: Workload, fitting: Workload, room: int | None) -> tuple[str, ...]:
    prompts = [f"a prompt of {n} tokens" for n in asked.prompt_tokens if n not in fitting.prompt_tokens]
    contexts = [f"{asked.steps} steps from a context of {n}" for n in asked.contexts if n not in fitting.contexts]
    return tuple(f"skipped: {what}, more than the {room} tokens that the caches hold" for what in [*prompts, *contexts])


def bench(artifact: Path, workload: Workload, threads: int, minimum_build: int = 0) -> BenchReport:
    """Open the artifact, time the workload, and measure the memory's bandwidth before and after; raises `UserError`."""
    # These load TVM's runtime, which `--help` and wrong flags do not need.
    from runtime.engines.engine import Engine
    from runtime.engines.side_by_side import SideBySide

    start = time.perf_counter()
    engine = Engine.open(artifact, threads=threads, minimum_build=minimum_build)
    load_s = time.perf_counter() - start
    manifest = engine.manifest
    step_bytes = step_bytes_of(manifest)
    on_cpu = not TARGETS[manifest.target.kind].on_device
    bandwidth = fresh_read_bandwidth(threads) if on_cpu else None
    speeds = measure(SideBySide(engine, 1), manifest.model.vocab_size, workload, step_bytes)
    longest = (
        max((p.prompt_tokens for p in speeds.prefill), default=0),
        max((d.context + workload.steps for d in speeds.decode), default=0),
    )
    return BenchReport(
        artifact=str(artifact),
        model=manifest.name,
        scheme=manifest.quantization.label,
        dtype=manifest.target.dtype,
        cpu=cpu_name(),
        cpu_level=engine.cpu_level,
        threads=threads,
        load_s=load_s,
        peak_rss_mb=peak_memory() / 1e6,
        held_mb=step_bytes(max(longest)) / 1e6,
        held_where="among them" if on_cpu else "on the GPU",
        weight_bytes_per_step=step_bytes(0),
        bandwidth_gb_s=None if bandwidth is None else max(bandwidth, fresh_read_bandwidth(threads)),
        bandwidth_method=METHOD if on_cpu else "`python -m runtime.gpucheck` measures a GPU's",
        speeds=speeds,
    )


def cpu_name() -> str:
    """The processor's name in /proc/cpuinfo."""
    lines = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines() if CPUINFO.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown processor"


def table(report: BenchReport) -> str:
    """The report as aligned columns: name, figure, unit."""
    rows = [
        ("artifact", report.artifact, f"{report.model}, scheme {report.scheme}, {report.dtype}"),
        ("machine", report.cpu, f"{report.threads} threads, code for {report.cpu_level}"),
        ("load", f"{report.load_s:.2f}", "s, every file hashed"),
    ]
    for p in report.speeds.prefill:
        rows += [
            (f"TTFT, {p.prompt_tokens} tokens", f"{p.ttft_s * 1e3:,.1f}", "ms"),
            ("  prefill", f"{p.tok_s:,.1f}", "tok/s"),
        ]
    for d in report.speeds.decode:
        share = "" if report.bandwidth_gb_s is None else f", {d.gb_s / report.bandwidth_gb_s:.0%} of the bandwidth"
        rows += [
            (f"decode, context {d.context}", f"{d.tok_s:,.1f}", f"tok/s ({d.step_s * 1e3:.2f} ms a step)"),
            ("  reads", f"{d.gb_s:,.2f}", f"GB/s ({d.bytes_per_step / 1e6:,.1f} MB a step){share}"),
        ]
    rows += [
        ("weights read", f"{report.weight_bytes_per_step / 1e6:,.1f}", "MB a step"),
        (
            "read bandwidth",
            "-" if report.bandwidth_gb_s is None else f"{report.bandwidth_gb_s:,.2f}",
            f"GB/s, {report.bandwidth_method}",
        ),
        (
            "peak memory",
            f"{report.peak_rss_mb:,.0f}",
            f"MB resident, {report.held_mb:,.0f} MB of weights and caches {report.held_where}",
        ),
    ]
    first, second = (max(len(row[i]) for row in rows[2:]) for i in (0, 1))
    lines = [f"{name.ljust(first)}  {figure.rjust(second)}  {unit}" for name, figure, unit in rows]
    return "\n".join([*lines, *report.speeds.skipped])


def counts(text: str) -> tuple[int, ...]:
    """Parse a list such as "128,512" into distinct positive numbers; raises `UserError`."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise UserError(
            f"{text!r} is not a list of token counts; expected positive numbers separated by commas, such as 128,512"
        )
    return tuple(dict.fromkeys(int(part) for part in parts))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure one artifact and print the table, or one JSON object."""
    parser = argparse.ArgumentParser(
        prog="python -m runtime.bench", description="Measure the speed of an artifact on this machine."
    )
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT", help="folder that `make compile` wrote")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_minimum_build(parser)
    parser.add_argument(
        "--prompt-tokens", default="128,512", metavar="N,N", help="prompt lengths to prefill (default: %(default)s)"
    )
    parser.add_argument(
        "--context", default="64,1024", metavar="N,N", help="contexts to decode from (default: %(default)s)"
    )
    parser.add_argument(
        "--tokens", type=int, default=32, metavar="N", help="decode steps at each context (default: %(default)s)"
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="CPU threads (default: all cores)",
    )
    parser.add_argument(
        "--repeats", type=int, default=5, metavar="N", help="how often each is measured (default: %(default)s)"
    )
    parts.add_flags(parser)
    args = parser.parse_args(argv)
    for flag in ("tokens", "threads", "repeats"):
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag} is {getattr(args, flag)}, expected at least 1")
    workload = Workload(counts(args.prompt_tokens), counts(args.context), args.tokens, args.repeats)
    part = parts.chosen_part(args, workload.contexts, counts)
    if part is not None:
        from runtime.engines.engine import Engine

        found = part(Engine.open(args.artifact, threads=args.threads, minimum_build=args.minimum_build))
        print(json.dumps(asdict(found)) if args.json else found.table())
        return 0
    report = bench(args.artifact, workload, args.threads, args.minimum_build)
    print(json.dumps(asdict(report)) if args.json else table(report))
    return 0


if __name__ == "__main__":
    run_command(main)
