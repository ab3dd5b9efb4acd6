"""`python -m runtime.gpucheck FOLDER ...`: is each of our CUDA kernels right on this GPU, and how close to its limits?

A folder holds a manifest and a library: an artifact, or what `make gpucheck` compiled in a model's sizes without its
weights. The weights are random and made here from a seed. Each of our kernels runs by itself and is compared with a
reference (`runtime.gpu_check.kernel_timing`); its share of the limit is the larger of two times divided by its own: its
bytes at the speed of a copy, and its operations at the matrix peak. Then whole models run: the checks of
`runtime.verify`, and their speed (`runtime.bench`). If some Python on this machine has torch, it measures the matrix
peak and the matrix products, and if one has transformers, models of the same sizes. Last, compute-sanitizer watches the
kernels of the smallest model.

A GPU is often there for minutes, so there is a limit, and a report is written again after each step: gpucheck.json and
gpucheck.md have all that was measured, and what was not, with the reason. What is measured runs in processes of its own
(`runtime.gpu_check.check_run`), none of which outlives this one.
"""

import argparse
import signal
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from runtime.artifact.durable import write_whole
from runtime.artifact.manifest import Manifest
from runtime.artifact.tensor_file import tensor_bytes
from runtime.errors import UserError, run_command
from runtime.gpu_check.check_run import CheckRun
from runtime.gpu_check.findings import TIME_WAS_UP, Findings, Reason
from runtime.gpu_check.folder import checked_manifest
from runtime.gpu_check.markdown import markdown, summary
from runtime.gpu_check.report import ModelReport

JSON_FILE, MARKDOWN_FILE = "gpucheck.json", "gpucheck.md"
SIGNALS = (signal.SIGTERM, signal.SIGHUP)  # a time limit, and a closed connection


def main(argv: Sequence[str] | None = None) -> int:
    """Check every folder, all kernels before any whole model; raises `UserError` if something is wrong."""
    args = parsed(argv)
    if not args.minutes > 0:  # nor is NaN
        raise UserError(f"--minutes is {args.minutes:g}, expected more than 0")
    manifests = {str(folder): checked_manifest(folder) for folder in args.folders}
    manifests = dict(sorted(manifests.items(), key=lambda item: _weight_bytes(item[1])))  # the smallest first
    findings = Findings(
        time.strftime("%Y-%m-%d", time.gmtime()),
        {folder: ModelReport(manifest.name) for folder, manifest in manifests.items()},
    )
    say: Callable[[str], None] = _nothing if args.json else partial(print, flush=True)
    save = partial(write_report, findings, args.report)
    run = CheckRun(manifests, findings, save, say, args.minutes * 60)
    run.plan(kernels=not args.models_only, models=not args.kernels_only)
    save()
    try:
        run.measure()
    finally:
        findings.close(Reason("interrupted"))
        try:
            save()
        finally:  # also where the disk is full
            if findings.gpu is not None:
                lines = map(findings.model_as_json, manifests) if args.json else ["", summary(findings)]
                print("\n".join(lines), flush=True)
    return status(findings, args.report)


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line's arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m runtime.gpucheck", description="Check and time the kernels of CUDA libraries on this GPU."
    )
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="artifacts, or folders of checks/")
    parts = parser.add_mutually_exclusive_group()
    parts.add_argument(
        "--kernels-only", action="store_true", help="skip the whole model, whose random weights take its full size"
    )
    parts.add_argument("--models-only", action="store_true", help="skip the kernels one by one")
    parser.add_argument(
        "--minutes", type=float, default=8, metavar="N", help="end after so many minutes (default: %(default)s)"
    )
    parser.add_argument(
        "--report",
        type=Path,
        default=Path(),
        metavar="FOLDER",
        help=f"where {JSON_FILE} and {MARKDOWN_FILE} are written (default: the current folder)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object per folder, each on one line, at the end"
    )
    return parser.parse_args(argv)


def write_report(findings: Findings, folder: Path) -> None:
    """Write everything that was found so far, as JSON and as tables."""
    write_whole(folder / JSON_FILE, findings.as_json().encode())
    write_whole(folder / MARKDOWN_FILE, markdown(findings).encode())


def status(findings: Findings, folder: Path) -> int:
    """The exit status; raises `UserError` if something is wrong, or time did not allow all of it.

    `folder` is that of the report.
    """
    tables = folder / MARKDOWN_FILE
    if findings.wrong:
        assert findings.gpu is not None, "nothing is checked without a GPU"
        raise UserError(f"{', '.join(findings.wrong)}: something is wrong on {findings.gpu.name}; see {tables}")
    late = sum(reason is TIME_WAS_UP for reason in findings.unmeasured.values())
    if late:
        raise UserError(f"time was up before {late} parts were measured, which {tables} lists; give it more --minutes")
    return 0


def _weight_bytes(manifest: Manifest) -> int:
    return sum(map(tensor_bytes, manifest.weights))


def _nothing(_text: str) -> None:
    """Print nothing, in place of `print`."""


if __name__ == "__main__":
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves it
            signal.signal(number, lambda caught, _frame: sys.exit(128 + caught))
    run_command(main)
