"""`python -m build.bench yaml/x.yaml`: our artifacts against onnxruntime on the very graphs that they were compiled from, in one run.

Compiles the config twice, as fp32 and as int8. Then rounds: each contender in turn, in a process of its own that is gone before the next
one starts (thread pools spin), does the same work; medians over the rounds are compared. onnxruntime gets its best ordinary use: default
graph optimizations, as many threads, and caches that stay where they are: outputs are bound to the buffers that are the next call's inputs.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from export.config import CompileConfig, load_config
from export.console import console, output
from export.graphs import GraphsRecord, OnnxGraphs
from runtime.bench import Report, Speeds, Workload, cache_bytes, cpu_name, measure, weight_bytes
from runtime.engine import chunk_sizes
from runtime.errors import UserError, run_command
from runtime.manifest import Manifest
from runtime.memory import METHOD, fresh_read_bandwidth
from runtime.tensor_file import numpy_dtype

SCHEMES = {"none": "fp32", "int8": "int8"}  # what is compiled, all with dtype fp32, and how it is called here
CONTEXTS = (64, 512)
RATIO_CONTEXT = CONTEXTS[0]
FP32_GOAL = 1.0  # decode fp32 over onnxruntime fp32, at least
INT8_GOAL = 2.0  # decode int8 over our fp32, at least
WORKER_FLAG = "--onnxruntime-worker"

Array = NDArray[Any]


class OnnxruntimeEngine:
    """Exported graphs under onnxruntime, with the face of `runtime.engine.Engine`; batch rows advance together.

    Two sets of caches take turns: a call reads one and writes the other, whole, as the graph says. Every input and output is bound once
    to a numpy array, so that a call copies nothing but what the graph itself copies.
    """

    def __init__(self, graphs: OnnxGraphs, threads: int) -> None:
        self.record = graphs.record
        self.position = 0
        decode = self.record.graphs[-1]
        self._caches = [[np.zeros(spec.shape, numpy_dtype(spec.dtype)) for spec in decode.signature.inputs[2:]] for _ in range(2)]
        self._current = 0  # the set that holds the past
        used = (self.record.graphs[0], decode)  # the largest chunk is enough: it takes padding
        self._calls = {graph.tokens: _BoundGraph(graphs, graph.name, self._caches, threads) for graph in used}

    @property
    def batch(self) -> int:
        """Rows that every call computes."""
        return self.record.shape.batch

    def room(self) -> int | None:
        """How many more tokens fit the caches; None when every layer has a window."""
        return None if all(self.record.model.sliding_window) else self.record.shape.cache_len - self.position

    def reset(self) -> None:
        """Forget everything; what lies in the caches is behind every later position's mask."""
        self.position = 0

    def prefill(self, prompts: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Append equally many ids to each row of an empty engine; logits (B, vocab) after the last."""
        ids = np.array(prompts, np.int64)
        sizes = chunk_sizes(ids.shape[1], tuple(self._calls), may_pad=self.position == 0)
        padded = np.pad(ids, ((0, 0), (sum(sizes) - ids.shape[1], 0)))
        position = self.position + ids.shape[1] - padded.shape[1]
        logits = np.empty(0, np.float32)
        for size in sizes:
            logits, padded = self._run(padded[:, :size], position), padded[:, size:]
            position += size
        self.position = position
        return logits

    def decode(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Append one id to each row; logits (B, vocab)."""
        logits = self._run(np.array(ids, np.int64)[:, None], self.position)
        self.position += 1
        return logits

    def _run(self, ids: NDArray[np.int64], position: int) -> NDArray[np.float32]:
        logits = self._calls[ids.shape[1]].run(self._current, ids, position)
        self._current = 1 - self._current
        return logits


class _BoundGraph:
    """One graph's session, bound for both directions between the two sets of caches."""

    def __init__(self, graphs: OnnxGraphs, name: str, caches: list[list[Array]], threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3  # errors only
        graph = next(graph for graph in graphs.record.graphs if graph.name == name)
        self._session = onnxruntime.InferenceSession(graphs.onnx_path(graph), options, providers=["CPUExecutionProvider"])
        self._ids, self._positions = (np.zeros(spec.shape, np.int64) for spec in graph.signature.inputs[:2])
        self._logits = np.zeros(graph.signature.outputs[0].shape, np.float32)
        inputs, outputs = ([spec.name for spec in specs] for specs in (graph.signature.inputs, graph.signature.outputs))
        self._bindings = []
        for past, present in (caches, reversed(caches)):
            binding = self._session.io_binding()
            for input_name, array in zip(inputs, [self._ids, self._positions, *past], strict=True):
                binding.bind_ortvalue_input(input_name, onnxruntime.OrtValue.ortvalue_from_numpy(array))  # shares the array's memory
            for output_name, array in zip(outputs, [self._logits, *present], strict=True):
                binding.bind_ortvalue_output(output_name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
            self._bindings.append(binding)

    def run(self, past: int, ids: NDArray[np.int64], position: int) -> NDArray[np.float32]:
        """One call on ids (B, T) from `position` on, reading the set of caches `past` and writing the other; logits (B, vocab)."""
        self._ids[...] = ids
        self._positions[...] = position + np.arange(ids.shape[1])
        self._session.run_with_iobinding(self._bindings[past])
        return self._logits[:, 0].copy()


@dataclass(frozen=True)
class Contender:
    """What runs, what it stores, and the command that measures it once and prints JSON."""

    what: str
    scheme: str
    command: tuple[str, ...]


@dataclass(frozen=True)
class Result:
    """Medians over the rounds: tokens per second of prefill and, by context, of decode; GB/s that decode reads at `RATIO_CONTEXT`."""

    what: str
    scheme: str
    prefill_tok_s: float
    decode_tok_s: dict[int, float]
    gb_s: float


@dataclass(frozen=True)
class Ratio:
    """One comparison that the project makes a promise about."""

    what: str
    measured: float
    at_least: float


def onnx_speeds(graphs: OnnxGraphs, workload: Workload, threads: int) -> Speeds:
    """Time onnxruntime on exported graphs; weights count as they are stored."""
    record: GraphsRecord = graphs.record
    weights = weight_bytes(record.weights, tied=record.model.tied_embeddings)
    itemsize = numpy_dtype(record.cache_dtype).itemsize
    engine = OnnxruntimeEngine(graphs, threads)
    return measure(engine, record.model.vocab_size, workload, lambda n: weights + cache_bytes(record.model, record.shape, n, itemsize))


def contenders(config_path: Path, overrides: list[str], steps: int, threads: int) -> list[Contender]:
    """Compile both variants; ours and onnxruntime's runs of each."""
    from build.compile import exported_graphs  # these load TVM's compiler, which the worker must not
    from build.variants import compile_variant

    prompt = load_config(config_path, overrides).shape.prefill_chunks[0]
    workload = msgspec.json.encode(Workload((prompt,), CONTEXTS, steps, repeats=1)).decode()
    flags = ["--prompt-tokens", str(prompt), "--context", ",".join(map(str, CONTEXTS)), "--tokens", str(steps), "--threads", str(threads)]
    ours, theirs = [], []
    for scheme, label in SCHEMES.items():
        variant = compile_variant(config_path, overrides, scheme, [f"quantize.scheme={scheme}", "backend.dtype=fp32"])
        _check_room(variant.artifact.manifest, steps)
        graphs = exported_graphs(load_config(variant.path), variant.path, [])
        python = (sys.executable, "-m")
        ours.append(Contender("ours", label, (*python, "runtime.bench", str(variant.artifact.folder), "--json", "--repeats", "1", *flags)))
        theirs.append(Contender("onnxruntime", label, (*python, "build.bench", WORKER_FLAG, str(graphs.folder), workload, str(threads))))
    return [*ours, *theirs]


def _check_room(manifest: Manifest, steps: int) -> None:
    needed, cache_len = RATIO_CONTEXT + steps, manifest.shape.cache_len
    if cache_len < needed and not all(manifest.model.sliding_window):
        raise UserError(f"shape.cache_len is {cache_len}, expected at least {needed} to measure in; add --set shape.cache_len={needed}")


def run_rounds(entries: Sequence[Contender], rounds: int, threads: int) -> tuple[list[Result], float]:
    """Each contender once a round, in order: medians over the rounds, and the best read bandwidth (GB/s) measured between them."""
    samples: list[list[Speeds]] = [[] for _ in entries]
    bandwidth = 0.0
    for number in range(rounds):
        bandwidth = max(bandwidth, fresh_read_bandwidth(threads))
        for entry, speeds in zip(entries, samples, strict=True):
            console.print(f"round {number + 1} of {rounds}: {entry.what} {entry.scheme}", style="dim")
            speeds.append(run_once(entry))
    return [_medians(entry, speeds) for entry, speeds in zip(entries, samples, strict=True)], bandwidth


def run_once(entry: Contender) -> Speeds:
    """One contender's process, to its end."""
    done = subprocess.run(entry.command, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        raise UserError(f"measuring {entry.what} {entry.scheme} ended with status {done.returncode}; its own message is above")
    return msgspec.json.decode(done.stdout, type=Report).speeds if entry.what == "ours" else msgspec.json.decode(done.stdout, type=Speeds)


def _medians(entry: Contender, rounds: Sequence[Speeds]) -> Result:
    decode = {d.context: median(r.decode[i].tok_s for r in rounds) for i, d in enumerate(rounds[0].decode)}
    prefill = median(r.prefill[0].tok_s for r in rounds)
    return Result(entry.what, entry.scheme, prefill, decode, median(r.decode[0].gb_s for r in rounds))


def promises(results: Sequence[Result]) -> list[Ratio]:
    """What the project promises, measured on decode at `RATIO_CONTEXT`."""
    speed = {(result.what, result.scheme): result.decode_tok_s[RATIO_CONTEXT] for result in results}
    return [
        Ratio("decode fp32 against onnxruntime fp32", speed["ours", "fp32"] / speed["onnxruntime", "fp32"], FP32_GOAL),
        Ratio("decode int8 against our fp32", speed["ours", "int8"] / speed["ours", "fp32"], INT8_GOAL),
    ]


def results_table(results: Sequence[Result], bandwidth: float, prompt: int) -> Table:
    """One row a contender; the ratio is decode at `RATIO_CONTEXT` over onnxruntime fp32."""
    base = next(r for r in results if (r.what, r.scheme) == ("onnxruntime", "fp32")).decode_tok_s[RATIO_CONTEXT]
    table = Table(title="medians, tokens per second")
    for name in ("what", "scheme", f"prefill {prompt}", *(f"decode at {n}" for n in results[0].decode_tok_s), "GB/s", "share", "ratio"):
        table.add_column(name, justify="left" if name in ("what", "scheme") else "right")
    for r in results:
        decode = [f"{speed:,.1f}" for speed in r.decode_tok_s.values()]
        rates = [f"{r.gb_s:.2f}", f"{r.gb_s / bandwidth:.0%}", f"{r.decode_tok_s[RATIO_CONTEXT] / base:.2f}"]
        table.add_row(r.what, r.scheme, f"{r.prefill_tok_s:,.1f}", *decode, *rates)
    return table


def work(graphs: str, workload: str, threads: str) -> int:
    """The worker's command: time onnxruntime once and print `Speeds` as JSON."""
    speeds = onnx_speeds(OnnxGraphs.open(Path(graphs)), msgspec.json.decode(workload, type=Workload), int(threads))
    print(json.dumps(asdict(speeds)))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, measure, print, and write the JSON; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == [WORKER_FLAG]:
        return work(*argv[1:])
    args = _parser().parse_args(argv)
    config = load_config(args.config, args.overrides)
    _check(config, args)
    results, bandwidth = run_rounds(contenders(args.config, args.overrides, args.tokens, args.threads), args.rounds, args.threads)
    machine = f"{cpu_name()}, {args.threads} threads, {bandwidth:.1f} GB/s read, {datetime.now(UTC):%Y-%m-%d}"
    output.print(results_table(results, bandwidth, config.shape.prefill_chunks[0]))
    ratios = promises(results)
    for r in ratios:
        output.print(f"{r.what}: {r.measured:.2f} (at least {r.at_least:.1f})")
    output.print(machine)
    path = args.json or Path("out/bench") / f"{args.config.stem}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"machine": machine, "bandwidth_gb_s": bandwidth, "bandwidth_method": METHOD, "rounds": args.rounds, "tokens": args.tokens}
    path.write_text(json.dumps(record | {"results": [asdict(r) for r in results], "ratios": [asdict(r) for r in ratios]}, indent=1) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m build.bench", description="Measure our artifacts against onnxruntime.")
    parser.add_argument("config", type=Path, help="YAML file, such as yaml/demo.yaml")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="set one value, may be repeated")
    parser.add_argument("--json", type=Path, metavar="PATH", help="where the figures go (default: out/bench/NAME.json)")
    parser.add_argument("--tokens", type=int, default=32, metavar="N", help="decode steps at each context (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="times that each contender runs (default: %(default)s)")
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
