"""`python -m build.parity yaml/x.yaml`: run the whole ladder and print it as one table.

Compiles what is stale, runs the export stage's rungs in their own process, replays their trace on the compiled
artifact, and writes the summary into the manifest. Exit status 1 if a rung fails.
"""

from pathlib import Path

import msgspec
import numpy as np
from rich.table import Table

from build.compile import compile_held
from export.configuration.config import config_parser
from export.console import console, output, step_bar
from export.job import Job
from export.proof.ladder import ROWS_FILE, TRACE_FILE, Case, Logits, compare, load_trace, pairs_with, ways_agree
from export.workspace import locked
from runtime.artifact.bounds import relative_bound
from runtime.artifact.folder import Artifact, replace_manifest
from runtime.artifact.manifest import ParityRow
from runtime.artifact.targets import TARGETS
from runtime.engines.engine import Engine
from runtime.errors import run_command

FAILED_STATUS = 1


def main() -> int:
    """Run the ladder; returns the exit status."""
    arguments = config_parser(
        "Prove an artifact: transformers == static torch == onnxruntime == compiled."
    ).parse_args()
    job = Job.load(arguments.config, arguments.overrides)
    with locked(job.workspace, console.print):  # to the end, so that no other run replaces what is compared
        rows = ladder(job, compile_held(job))
    return 0 if all(row.passed for row in rows) else FAILED_STATUS


def ladder(job: Job, artifact: Artifact) -> list[ParityRow]:
    """Run every rung, print the table, and write the rows into the artifact's manifest."""
    rows = run_export_rungs(job)
    if not TARGETS[artifact.manifest.target.kind].on_device:
        rows += run_artifact_rungs(artifact, *load_trace(job.workspace / TRACE_FILE))
    else:
        console.print(
            f"the artifact's own rungs need a {artifact.manifest.target.kind} device and were not run; "
            "the graphs themselves are proved below"
        )
    rows.sort(key=lambda row: row.rung)
    output.print(table(artifact.folder, rows))
    replace_manifest(artifact.folder, msgspec.structs.replace(artifact.manifest, parity=tuple(rows)))
    return rows


def run_export_rungs(job: Job) -> list[ParityRow]:
    """Run the rungs that need torch in their own process."""
    job.start("export.parity")
    return msgspec.json.decode((job.workspace / ROWS_FILE).read_bytes(), type=list[ParityRow])


def run_artifact_rungs(artifact: Artifact, cases: list[Case], expected: list[list[Logits]]) -> list[ParityRow]:
    """Compare the compiled artifact with the trace, with itself under other chunk sizes, and row with row."""
    engine = Engine.open(artifact.folder)
    manifest = artifact.manifest
    bound = relative_bound(
        manifest.model, manifest.shape.cache_len, manifest.cache_dtype, manifest.quantization.rounding
    )
    answers = []
    with step_bar("compiled artifact", len(cases)) as bar:
        for case in cases:
            engine.reset()
            answers.append(case.run(engine.step))
            bar.advance(1)
    rows = [
        compare("3", "onnxruntime and compiled artifact, every call", pairs_with(cases, answers, expected), bound),
        compare("4", "compiled artifact: one by one, chunked and whole", ways_agree(cases, answers), bound),
    ]
    if engine.batch > 1:
        rows.append(
            compare("5", "row 0 whatever the other rows hold, bit for bit", row_pairs(engine, cases, answers), 0.0)
        )
    return rows


def row_pairs(engine: Engine, cases: list[Case], answers: list[list[Logits]]) -> list[tuple[Logits, Logits]]:
    """Run row 0 of every case again while all other rows hold other token ids."""
    pairs = []
    for case, before in zip(cases, answers, strict=True):
        ids = case.ids.copy()
        ids[1:] = np.flip(ids[1:], axis=1) // 2
        engine.reset()
        after = Case(case.label, ids, case.schedule).run(engine.step)
        pairs += [(a[:1], b[:1]) for a, b in zip(after, before, strict=True)]
    return pairs


def table(folder: Path, rows: list[ParityRow]) -> Table:
    """The ladder as a table."""
    result = Table(title=f"parity of {folder}", title_justify="left")
    result.add_column("rung")
    result.add_column("compared")
    for name in ("max |difference|", "relative", "bound", "same top-1"):
        result.add_column(name, justify="right")
    result.add_column("")
    for row in rows:
        verdict = "[green]pass[/]" if row.passed else "[red]FAIL[/]"
        numbers = (f"{row.max_abs:.2e}", f"{row.max_rel:.2e}", f"{row.bound:.2e}", f"{row.top1_agreement:.2%}")
        result.add_row(row.rung, row.compared, *numbers, verdict)
    return result


if __name__ == "__main__":
    run_command(main)
