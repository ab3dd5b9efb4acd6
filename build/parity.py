"""`python -m build.parity yaml/x.yaml`: run the whole ladder and print it as one table.

Compiles what is stale, runs the export stage's rungs in their own process, replays their trace on the compiled
artifact, and writes the summary into the manifest. Exit status 1 if a rung fails.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray
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
from runtime.engines.slot_model import Row
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


@dataclass
class CompiledStepper:
    """The compiled artifact as a stepper: sequence i is in slot `slots[i]`, or in one of them if it is alone."""

    engine: Engine
    slots: list[int] = field(default_factory=list)

    def reset(self, rows: int) -> None:
        """Take other slots than before, last ones first, and empty them."""
        count = self.engine.slots
        start = (self.slots[0] if self.slots else 0) - 1
        self.slots = [(start - i) % count for i in range(rows)]  # those beyond the slots have only padding
        for slot in self.slots[:count]:
            self.engine.rewind(slot, 0)

    def step(self, ids: NDArray[np.int64], first: NDArray[np.int64]) -> Logits:
        """One call for ids (B, T) at positions first .. first + T - 1 of each row, without what is padding."""
        tokens = ids.shape[1]
        if tokens > 1:
            real = ids[0, max(-int(first[0]), 0) :].tolist()
            return self.engine.outputs(self.slots[0], real, size=tokens)[-1:] if real else self._nothing(1)
        shown = np.flatnonzero(first >= 0)[::-1]
        logits = self._nothing(len(ids))
        rows = [Row(self.slots[i], int(ids[i, 0])) for i in shown]
        logits[shown] = self.engine.step(rows, size=len(ids))
        return logits

    def _nothing(self, rows: int) -> Logits:
        return np.zeros((rows, self.engine.manifest.model.n_outputs), np.float32)


def run_artifact_rungs(artifact: Artifact, cases: list[Case], expected: list[list[Logits]]) -> list[ParityRow]:
    """Compare the compiled artifact with the trace, with itself under other chunk sizes, and row with row."""
    engine = Engine.open(artifact.folder)
    manifest = artifact.manifest
    bound = relative_bound(
        manifest.model, manifest.shape.cache_len, manifest.cache_dtype, manifest.quantization.rounding
    )
    stepper = CompiledStepper(engine)
    with step_bar("compiled artifact", 2 * len(cases)) as bar:
        answers = [_answers(stepper, case, bar.advance) for case in cases]
        again = [_answers(stepper, _other_companions(case), bar.advance) for case in cases]
    alone = [case for case in cases if len(case.sequences) == 1 and manifest.model.generates]
    exact = TARGETS[manifest.target.kind].same_bits_in_any_call
    ways = ways_agree([*cases, *alone], [*answers, *[[_by_steps(engine, case)] for case in alone]])
    return [
        compare("3", "onnxruntime and compiled artifact, every call", pairs_with(cases, answers, expected), bound),
        compare(
            "4",
            "compiled artifact: one by one, chunked and whole" + (", bit for bit" if exact else ""),
            ways,
            0.0 if exact else bound,
        ),
        compare(
            "5",
            "a sequence whatever shares its steps, in any slot, bit for bit",
            [(a[:1], b[:1]) for a, b in pairs_with(cases, again, answers)],
            0.0,
        ),
    ]


def _answers(stepper: CompiledStepper, case: Case, advance: Callable[[int], None]) -> list[Logits]:
    stepper.reset(len(case.sequences))
    found = case.run(stepper.step)
    advance(1)
    return found


def _other_companions(case: Case) -> Case:
    """The same first sequence beside others of the same lengths."""
    first, *others = case.sequences
    return Case(case.label, (first, *(np.flip(ids) // 2 for ids in others)), case.schedule)


def _by_steps(engine: Engine, case: Case) -> Logits:
    """The last logits of a sequence that is fed as rows of one slot, as many as a step has."""
    (ids,) = case.sequences
    engine.rewind(0, 0)
    logits = np.empty(0, np.float32)
    for start in range(0, len(ids), engine.step_rows[-1]):
        logits = engine.step([Row(0, int(i)) for i in ids[start : start + engine.step_rows[-1]]])
    return logits[-1:]


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
