"""`python -m runtime.startup ARTIFACT`: where the time from process start to first token goes, and the memory it takes.

Each sample is a new process that does what `runtime.generate` does first. Its weights are pages of the mapped file: any
number of processes share them, and only the rest is a process's own memory.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from runtime.errors import UserError, run_command

PROMPT = "The capital of France is"
PROMPT_IDS = (1, 2, 3, 4, 5)  # for artifacts without a tokenizer
PHASES = ("interpreter", "imports", "check and open", "tokenizer", "first token")


@dataclass(frozen=True)
class Sample:
    """One process: seconds of each phase, in order, and resident memory at the end in MB (1e6), its own and mapped."""

    seconds: tuple[float, ...]
    own_mb: float
    mapped_mb: float


def sample(artifact: Path, threads: int) -> Sample:
    """Start a process and let it report; if it fails, raises `UserError` after the process's own message."""
    code = f"from runtime.startup import report; report({str(artifact)!r}, {threads}, {time.monotonic()!r})"
    done = subprocess.run([sys.executable, "-c", code], check=False, stdout=subprocess.PIPE)
    if done.returncode:
        raise UserError(f"starting {artifact} ended with status {done.returncode}; its own message is above")
    found = json.loads(done.stdout)
    return Sample(tuple(found["seconds"]), found["own_mb"], found["mapped_mb"])


def report(artifact: str, threads: int, started: float) -> None:
    """Run in a sample's process: reach the first token, and print a `Sample` as JSON.

    `started` is the monotonic time in seconds just before the process was started.
    """
    run_command(lambda: _report(Path(artifact), threads, started))


def _report(artifact: Path, threads: int, started: float) -> int:
    moments = [started, time.monotonic()]
    from runtime.engines.engine import Engine
    from runtime.text.tokenizer import open_tokenizer

    moments.append(time.monotonic())
    engine = Engine.open(artifact, threads=threads)
    moments.append(time.monotonic())
    spec = engine.manifest.tokenizer
    ids = PROMPT_IDS if spec is None else open_tokenizer(spec, engine.folder).encode(PROMPT)
    moments.append(time.monotonic())
    engine.feed(0, ids).argmax(-1)
    moments.append(time.monotonic())
    seconds = tuple(after - before for before, after in itertools.pairwise(moments))
    print(json.dumps(asdict(Sample(seconds, _resident_mb("RssAnon"), _resident_mb("RssFile")))))
    return 0


def _resident_mb(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024 / 1e6


def table(samples: Sequence[Sample]) -> str:
    """Medians as aligned columns."""
    phases = [median(each.seconds[i] for each in samples) for i in range(len(PHASES))]
    total = median(sum(each.seconds) for each in samples)
    rows = [(name, f"{seconds * 1e3:,.0f}", "ms") for name, seconds in zip(PHASES, phases, strict=True)]
    rows += [
        ("process start to first token", f"{total * 1e3:,.0f}", f"ms, median of {len(samples)} processes"),
        ("memory of its own", f"{median(each.own_mb for each in samples):,.0f}", "MB"),
        (
            "memory shared with others",
            f"{median(each.mapped_mb for each in samples):,.0f}",
            "MB, pages of mapped files",
        ),
    ]
    first, second = (max(len(row[i]) for row in rows) for i in (0, 1))
    return "\n".join(f"{name.ljust(first)}  {figure.rjust(second)}  {unit}" for name, figure, unit in rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m runtime.startup", description="Measure the time from process start to the first token."
    )
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT", help="folder that `make compile` wrote")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="processes to start (default: %(default)s)")
    parser.add_argument(
        "--threads",
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="CPU threads (default: all cores)",
    )
    args = parser.parse_args(argv)
    for flag in ("repeats", "threads"):
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag} is {getattr(args, flag)}, expected at least 1")
    print(table([sample(args.artifact, args.threads) for _ in range(args.repeats)]))
    return 0


if __name__ == "__main__":
    run_command(main)
