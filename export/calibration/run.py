"""The calibration of a compile: reads the text, rounds the model's 4-bit tensors, and records and tells the errors."""

from collections.abc import Sequence
from pathlib import Path

import msgspec

from export.calibration.calibrate import calibrated
from export.calibration.gptq import DAMPING
from export.calibration.methods import Method
from export.calibration.results import LayerResults, RoundingError
from export.calibration.text import open_text
from export.calibration.tokens import calibration_rows
from export.checkpoints.checkpoint import Checkpoint
from export.console import console
from export.weights.stored import WeightsRecord
from runtime.artifact.manifest import Record
from runtime.artifact.tensor_file import TensorFile

ERRORS_FILE = "rounding.json"


class Calibration(Record, frozen=True):
    """How tensors were rounded, as it is recorded beside the stored weights."""

    text: str
    tokens: int
    errors: list[RoundingError]


def rounded_tensors(
    checkpoint: Checkpoint, record: WeightsRecord, method: Method, text: Path | None, folder: Path, layers: Path
) -> list[TensorFile]:
    """The model's rounded tensors, in files in `layers`, where finished layers are kept.

    `text` is a file of the user's, `folder` the one of the stored weights, which has the tokenizer already. Raises
    `UserError` for a text that does not serve, and for a model that does not compute finite numbers on it.
    """
    assert record.tokenizer is not None
    opened = open_text(text)
    ids = calibration_rows(opened, method.rows, record.model, record.tokenizer, folder)
    files, errors = calibrated(checkpoint, record, ids, LayerResults(layers))
    (folder / ERRORS_FILE).write_bytes(
        msgspec.json.encode(Calibration(text=opened.name, tokens=ids.size, errors=errors))
    )
    for note in _notes(errors):
        console.print(note, markup=False)
    return files


def _notes(errors: Sequence[RoundingError]) -> list[str]:
    """The error of each kind of matrix, the largest error, and the matrices that needed more damping."""
    by_kind: dict[str, list[float]] = {}
    for error in errors:
        by_kind.setdefault(error.tensor.removesuffix(".weight").rpartition(".")[2], []).append(error.error)
    kinds = ", ".join(f"{kind} {sum(found) / len(found):.1%}" for kind, found in by_kind.items())
    worst = max(errors, key=lambda error: error.error)
    notes = [f"mean relative error of outputs: {kinds}; largest: {worst.tensor} {worst.error:.1%}"]
    notes += [
        f"{error.tensor}: its inputs depend on each other so closely that the damping rose to {error.damping:g} of the "
        f"mean of their squares, from {DAMPING:g}"
        for error in errors
        if error.damping is not None and error.damping > DAMPING
    ]
    return notes
