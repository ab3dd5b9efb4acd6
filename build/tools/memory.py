"""`python -m build.tools.memory`: measure the memory that a compile takes.

It is measured on a random model at a few depths and extrapolated to the model's full depth. A compile must not hold
the whole model: its peak may grow with the largest tensor, but not with the number of layers. Each depth gets a
random checkpoint on disk and a fresh workspace; export and build run one after the other in separate processes, as in
a real compile. Only anonymous memory counts (RssAnon in /proc/PID/status, sampled): pages of mapped files can be
dropped at any time, and are left out.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from rich.table import Table

from build.tools.random_checkpoint import SHAPES, model_config, write_random_checkpoint
from export.checkpoints import tensor_layout
from export.console import output
from export.stage import ROOT
from runtime.artifact.schemes import SCHEMES
from runtime.artifact.targets import TARGETS
from runtime.bench import counts
from runtime.errors import UserError, run_command

SAMPLE_SECONDS = 0.005  # less time than it takes to fill the smallest array that would matter here
STAGES = ("export", "build")


@dataclass(frozen=True)
class Usage:
    """Memory and time of one process from start to end."""

    peak_bytes: int  # anonymous memory of it and its children
    seconds: float


@dataclass(frozen=True)
class Compile:
    """One compile at one depth: the usage of each of `STAGES`, and the size of the artifact."""

    layers: int
    stages: dict[str, Usage]
    artifact_bytes: int


def run_measured(command: Sequence[str], folder: Path) -> Usage:
    """Run a command of this project in `folder` without its standard output; raises `UserError` if it fails."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    start, peak = time.perf_counter(), 0
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            peak = max(peak, anonymous_bytes(process.pid))
            time.sleep(SAMPLE_SECONDS)
    if process.returncode:
        raise UserError(f"{' '.join(command[1:])} ended with status {process.returncode}; its own message is above")
    return Usage(peak, time.perf_counter() - start)


def anonymous_bytes(pid: int, parent: bytes | None = None) -> int:
    """Anonymous resident memory of a process and all its descendants; 0 for one that has ended.

    A child that still has the command line of its `parent` has not loaded its program: its memory is the parent's, seen
    twice.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        children = [
            int(child)
            for task in Path(f"/proc/{pid}/task").iterdir()
            for child in (task / "children").read_text().split()
        ]
    except (FileNotFoundError, ProcessLookupError):
        return 0
    if command == parent:
        return 0
    # The kernel's kB is 1024 bytes.
    own = [int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon:")]
    return sum(own) + sum(anonymous_bytes(child, command) for child in children)


def measure(shape: str, layers: int, scheme: str, target: str, parent: Path) -> Compile:
    """Write a random checkpoint under `parent`, compile it, and remove everything again."""
    with tempfile.TemporaryDirectory(prefix="memory-", dir=parent) as temporary:
        folder = Path(temporary).resolve()
        write_random_checkpoint(folder / "checkpoint", shape, layers)
        config = {
            "name": f"random-{shape}-{layers}",
            "frontend": {"checkpoint": "checkpoint", "type": "huggingface"},
            "quantize": {"scheme": scheme},
            "backend": {"target": target, "cpu": "x86-64-v3"},
        }
        (folder / "model.yaml").write_text(json.dumps(config))
        stages = {stage: run_measured([sys.executable, "-m", stage, "model.yaml"], folder) for stage in STAGES}
        size = sum(path.stat().st_size for path in (folder / "out" / "model").iterdir())
    return Compile(layers, stages, size)


def largest_tensor(shape: str) -> tuple[str, int]:
    """Our name for the model's largest tensor, and its bytes in float32.

    Every stage that computes on the tensor must hold it in float32.
    """
    sizes = {name: 4 * prod(weight.shape) for name, weight in tensor_layout.weights(*model_config(shape, 1)).items()}
    name = max(sizes, key=lambda key: sizes[key])
    return name, sizes[name]


def slope(depths: Sequence[int], values: Sequence[float]) -> float:
    """Growth per layer, from the smallest depth to the largest."""
    return (values[-1] - values[0]) / (depths[-1] - depths[0])


def results_table(compiles: Sequence[Compile], full_depth: int, largest: int) -> Table:
    """Tabulate peaks in MB (1e6), the artifact and seconds.

    The columns are: as measured, for each additional layer, extrapolated to the full depth, and as a multiple of the
    largest tensor.
    """
    depths = [compile.layers for compile in compiles]
    table = Table(title_justify="left")
    table.add_column("")
    for name in (*(f"{n} layers" for n in depths), "each layer", f"{full_depth} layers*", "largest tensors"):
        table.add_column(name, justify="right")
    for stage in STAGES:
        peaks = [compile.stages[stage].peak_bytes for compile in compiles]
        extended = peaks[-1] + slope(depths, peaks) * (full_depth - depths[-1])
        table.add_row(
            f"{stage}: peak, MB", *_row([p / 1e6 for p in peaks], depths, full_depth), f"{extended / largest:.1f}"
        )
    for stage in STAGES:  # not extrapolated: time depends on what else the machine does
        table.add_row(
            f"{stage}: time, s", *(f"{compile.stages[stage].seconds:,.1f}" for compile in compiles), "", "", ""
        )
    table.add_row("artifact, MB", *_row([compile.artifact_bytes / 1e6 for compile in compiles], depths, full_depth), "")
    return table


def _row(values: Sequence[float], depths: Sequence[int], full_depth: int) -> list[str]:
    each = slope(depths, values)
    return [f"{value:,.1f}" for value in (*values, each, values[-1] + each * (full_depth - depths[-1]))]


def main() -> int:
    """Measure every depth and print the table; returns the exit status."""
    arguments = _parser().parse_args()
    depths = sorted(counts(arguments.layers))
    if len(depths) < 2:
        raise UserError(
            f"--layers is {arguments.layers}, expected at least two depths, such as 2,4, to tell what a layer adds"
        )
    arguments.folder.mkdir(parents=True, exist_ok=True)
    compiles = [
        measure(arguments.shape, layers, arguments.scheme, arguments.target, arguments.folder) for layers in depths
    ]
    name, largest = largest_tensor(arguments.shape)
    full_depth = SHAPES[arguments.shape]["num_hidden_layers"]
    output.print(
        f"compiling a random model with the sizes of {arguments.shape}, scheme {arguments.scheme}, "
        f"target {arguments.target}"
    )
    output.print(results_table(compiles, full_depth, largest))
    output.print(f"* extrapolated linearly. The largest tensor is {name}: {largest / 1e6:,.1f} MB in float32.")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m build.tools.memory", description="Measure the memory that a compile takes."
    )
    parser.add_argument("--layers", default="2,4", metavar="N,N", help="depths to measure (default: %(default)s)")
    parser.add_argument("--shape", choices=SHAPES, default="7b", help="sizes of the model (default: %(default)s)")
    parser.add_argument("--scheme", choices=SCHEMES, default="int8", help="weight storage (default: %(default)s)")
    parser.add_argument(
        "--target", choices=TARGETS, default="llvm", help="machine to compile for (default: %(default)s)"
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("out/.work"), help="where temporary files go (default: %(default)s)"
    )
    return parser


if __name__ == "__main__":
    run_command(main)
