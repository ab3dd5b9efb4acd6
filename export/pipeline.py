"""The export stage: turns a checkpoint into stored weights, and traces ONNX graphs over them.

Each result has a key and is made only once.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from export.calibration.methods import calibration, readable
from export.checkpoints.checkpoint import Checkpoint
from export.checkpoints.tokenizers.chat import tokenizer_notes
from export.console import console
from export.job import Job
from export.memory_use import check_graphs_memory, check_storing_memory
from export.onnx_graphs.graphs import CONTENTS_SUFFIX, OnnxGraphs, record_path
from export.peak_memory import note_peak
from export.results import (
    LAYERS_STAGE,
    WEIGHTS_STAGE,
    graphs_key,
    graphs_record,
    open_configured,
    quantization_of,
    weights_key,
    weights_record,
)
from export.tokenizer_trial import try_tokenizer
from export.weights.stored import StoredWeights, WeightsRecord
from export.weights.storing import carrying_notes, store_weights, write_tokenizer
from export.workspace import growing_stage, is_whole, locked, locked_stage, remove_stage, run_stage, seal
from runtime.artifact.consistency import tokenizer_problems
from runtime.artifact.tensor_file import TensorFile
from runtime.errors import UserError


def export_model(job: Job) -> OnnxGraphs:
    """The job's graphs over its stored weights; results that are whole are reused."""
    with locked(job.workspace, console.print), locked_stage(job.workspace, "export", console.print):
        key = weights_key(job.config)
        stored = StoredWeights.open(run_stage(job.workspace, WEIGHTS_STAGE, key, partial(_store, job)))
        remove_stage(job.workspace, LAYERS_STAGE)  # the weights hold what they were rounded to
        path = record_path(stored.folder, graphs_key(job.config))
        contents = path.with_suffix(CONTENTS_SUFFIX)
        if is_whole(stored.folder, contents.name):
            return OnnxGraphs.open(path)
        from export.onnx_graphs.tracing import trace_over  # imports torch, which finished graphs do not need

        record = graphs_record(job.config, stored.record)
        check_graphs_memory(record)
        graphs = trace_over(stored, record, path)
        seal(contents, [path, *map(graphs.onnx_path, graphs.record.graphs)])
        note_peak(stored.folder)
        return graphs


def check_special_ids(record: WeightsRecord, where: Path) -> None:
    """Raise `UserError` for ids of a tokenizer for which an artifact would be refused."""
    for problem in tokenizer_problems(record.tokenizer, record.model.vocab_size):
        raise UserError(f"{where}: {problem}; correct it in the checkpoint's files")


def _store(job: Job, folder: Path) -> None:
    checkpoint = open_configured(job.config)
    for note in (*checkpoint.notes, *tokenizer_notes(checkpoint.tokenizer, job.config.frontend.checkpoint)):
        console.print(f"warning: {note}", style="yellow")
    record = readable(weights_record(job.config, checkpoint))
    for note in carrying_notes(record, checkpoint):
        console.print(f"warning: {note}", style="yellow")
    where = job.config.frontend.checkpoint
    check_special_ids(record, where)
    check_storing_memory(checkpoint, record)
    check_graphs_memory(graphs_record(job.config, record))
    write_tokenizer(checkpoint, record, folder)
    try_tokenizer(record, folder, where)
    store_weights(record, checkpoint, folder, _rounded(job, checkpoint, record, folder))
    note_peak(folder)


def _rounded(job: Job, checkpoint: Checkpoint, record: WeightsRecord, folder: Path) -> Sequence[TensorFile]:
    """The tensors that are rounded by a calibration text; none if their own numbers are all that counts."""
    wanted = quantization_of(job.config)
    if record.quantization.method != wanted.method:
        console.print(
            f"warning: {job.config.frontend.checkpoint} has no tokenizer to read a calibration text with, so "
            f"quantize.method is {record.quantization.method} instead of {wanted.method}",
            style="yellow",
        )
    method = calibration(record)
    if method is None:
        return ()
    from export.calibration.run import rounded_tensors  # imports torch, which other weights do not need

    layers = growing_stage(job.workspace, LAYERS_STAGE, weights_key(job.config))
    return rounded_tensors(checkpoint, record, method, job.config.quantize.calibration, folder, layers)
