"""`python -m build.bench.serving ARTIFACT`: a server under load, beside its own engine and llama.cpp's server.

In each round, the server runs in a process of its own with 1 to 8 clients, and then the engine alone with as many
sequences; ratios are of figures of the same round. Guessing tokens is off in both. locust, where it is installed
(`make test-server`), is an independent client, and `llama-server`, where it is installed, a rival.
"""

import argparse
import asyncio
import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import msgspec

from build.bench.processes import json_of
from build.bench.sequences import our_command
from build.bench.served_process import LLAMA_SERVER, Served, llama_server, our_server, reason_without_llama
from build.bench.serving_load import LoadWorkload, measure_co_tenant, measure_level
from build.bench.serving_report import Rounds, draw_load, goals_table, levels_table
from export.console import console, output
from runtime.artifact.folder import read_manifest
from runtime.artifact.manifest import Manifest
from runtime.benchmarks.sequences import SequencesReport, SequencesWorkload
from runtime.errors import UserError, run_command

OURS, NAME = "ours", "measured"
CLIENTS = (1, 2, 4, 8)
SETTINGS: dict[str, object] = {"speculate": False, "stall_budget": 0.1}
LONG_PROMPT = 4096  # or the longest that fits
ROOM_BESIDE_PROMPT = 64
LOCUST_USERS, LOCUST_SECONDS = 4, 15


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, draw and write the JSON; returns the exit status."""
    args = _parser().parse_args(argv)
    manifest = read_manifest(args.artifact)
    workload = _workload(manifest, args)
    rounds = Rounds(float(str(SETTINGS["stall_budget"])))
    reason = reason_without_llama(args.gguf)
    if reason is not None:
        console.print(f"{LLAMA_SERVER} is left out: {reason}")
    for number in range(args.rounds):
        console.print(f"round {number + 1} of {args.rounds}", style="dim")
        with our_server(args.artifact, NAME, SETTINGS, args.threads) as served:
            asyncio.run(_measure(served, OURS, workload, rounds))
            if number == args.rounds - 1:
                rounds.locust = _locust(served, args.tokens)
        _measure_engine(args.artifact, manifest, workload, args.threads, rounds)
        if reason is None:
            columns = workload.longest_prompt + ROOM_BESIDE_PROMPT
            with llama_server(args.gguf, manifest.shape.slots, columns, args.threads) as served:
                asyncio.run(_measure(served, LLAMA_SERVER, workload, rounds))
    _report(rounds, args)
    return 0


def _workload(manifest: Manifest, args: argparse.Namespace) -> LoadWorkload:
    most = manifest.shape.cache_len or LONG_PROMPT + ROOM_BESIDE_PROMPT
    longest = min(LONG_PROMPT, most - ROOM_BESIDE_PROMPT)
    if longest < args.prompt + args.tokens:
        raise UserError(
            f"{args.artifact} holds {most} tokens of a sequence, expected more than "
            f"{args.prompt + args.tokens + ROOM_BESIDE_PROMPT}; pass a smaller --prompt or --tokens"
        )
    return LoadWorkload(CLIENTS, args.prompt, args.tokens, args.requests, manifest.model.vocab_size, longest)


async def _measure(served: Served, server: str, workload: LoadWorkload, rounds: Rounds) -> None:
    """One round of one server; the first request, which warms it up, is not counted."""
    make = workload.prompts()
    await measure_level(served, 1, workload, make)
    for clients in workload.clients:
        rounds.add(server, await measure_level(served, clients, workload, make))
    if server == OURS:
        rounds.co_tenants.append(await measure_co_tenant(served, workload, make))


def _measure_engine(artifact: Path, manifest: Manifest, workload: LoadWorkload, threads: int, rounds: Rounds) -> None:
    """The engine alone with as many sequences, as far as it has slots."""
    counts = tuple(n for n in workload.clients if n <= manifest.shape.slots)
    asked = SequencesWorkload(counts, (workload.prompt,), workload.tokens, repeats=1)
    report = msgspec.json.decode(json_of(our_command(artifact, asked, threads), "sequences"), type=SequencesReport)
    for speed in report.speeds:
        rounds.engine.setdefault(speed.sequences, []).append(speed.tok_s)


def _locust(served: Served, tokens: int) -> str:
    """What locust found, as it prints it."""
    if importlib.util.find_spec("locust") is None:
        return "locust is left out: it is not installed (`make test-server` adds it)"
    console.print(f"locust with {LOCUST_USERS} users for {LOCUST_SECONDS} s", style="dim")
    flags = ["--headless", "--only-summary", "--users", str(LOCUST_USERS), "--spawn-rate", str(LOCUST_USERS)]
    flags += ["--run-time", f"{LOCUST_SECONDS}s", "--stop-timeout", "30", "--host", f"http://127.0.0.1:{served.port}"]
    done = subprocess.run(
        [sys.executable, "-m", "locust", "--locustfile", str(Path(__file__).with_name("locustfile.py")), *flags],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "SERVED_MODEL": served.model, "ANSWER_TOKENS": str(tokens)},
    )
    if done.returncode:
        raise UserError(f"locust ended with status {done.returncode}: {done.stdout}{done.stderr}")
    return (done.stdout + done.stderr).strip()


def _report(rounds: Rounds, args: argparse.Namespace) -> None:
    output.print(levels_table(rounds))
    output.print(goals_table(rounds, OURS))
    output.print(rounds.locust)
    path = args.json or Path("out/bench") / f"{args.artifact.name}-serving.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(asdict(rounds)), indent=1))
    draw_load(rounds, path.with_suffix(".svg"))
    output.print(f"figures and plot: {path}, {path.with_suffix('.svg')}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m build.bench.serving", description="Measure a server of an artifact under load."
    )
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT", help="folder that `make compile` wrote")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help=f"the same weights, for {LLAMA_SERVER}")
    parser.add_argument("--json", type=Path, metavar="PATH", help="where the figures go (default: in out/bench)")
    for name, default, what in (
        ("rounds", 3, "rounds, each with servers that are started anew"),
        ("prompt", 64, "tokens of a prompt"),
        ("tokens", 128, "tokens of an answer"),
        ("requests", 3, "requests of each client, one after another"),
        ("threads", len(os.sched_getaffinity(0)), "CPU threads of the engine"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{what} (default: {default})")
    return parser


if __name__ == "__main__":
    run_command(main)
