"""The export stage: turns a checkpoint into stored weights, and traces ONNX graphs over them.

Each result has a key and is made only once.
"""

from functools import partial
from pathlib import Path

from export.checkpoints.checkpoint import Checkpoint
from export.console import console
from export.job import Job
from export.memory_use import check_memory
from export.onnx_graphs.graphs import CONTENTS_SUFFIX, GraphsRecord, OnnxGraphs, record_path
from export.peak_memory import note_peak
from export.results import WEIGHTS_STAGE, graphs_key, graphs_record, open_configured, weights_key, weights_record
from export.tokenizer_trial import try_tokenizer
from export.weights.stored import StoredWeights
from export.weights.storing import store_checkpoint
from export.workspace import is_whole, locked, locked_stage, run_stage, seal
from runtime.artifact.consistency import tokenizer_problems
from runtime.errors import UserError


def export_model(job: Job) -> OnnxGraphs:
    """The job's graphs over its stored weights; results that are whole are reused."""
    with locked(job.workspace, console.print), locked_stage(job.workspace, "export", console.print):
        key = weights_key(job.config)
        stored = StoredWeights.open(run_stage(job.workspace, WEIGHTS_STAGE, key, partial(_store, job)))
        path = record_path(stored.folder, graphs_key(job.config))
        contents = path.with_suffix(CONTENTS_SUFFIX)
        if is_whole(stored.folder, contents.name):
            return OnnxGraphs.open(path)
        from export.onnx_graphs.tracing import trace_over  # imports torch, which finished graphs do not need

        graphs = trace_over(stored, graphs_record(job.config, stored.record), path)
        seal(contents, [path, *map(graphs.onnx_path, graphs.record.graphs)])
        note_peak(stored.folder)
        return graphs


def check_plan(checkpoint: Checkpoint, record: GraphsRecord, where: Path) -> None:
    """Raise `UserError` for whatever is known to be refused later, before anything takes time."""
    for problem in tokenizer_problems(record.tokenizer, record.model.vocab_size):
        raise UserError(f"{where}: {problem}; correct it in the checkpoint's files")
    check_memory(checkpoint, record)


def _store(job: Job, folder: Path) -> None:
    checkpoint = open_configured(job.config)
    for note in checkpoint.notes:
        console.print(f"warning: {note}", style="yellow")
    record = weights_record(job.config, checkpoint)
    check_plan(checkpoint, graphs_record(job.config, record), job.config.frontend.checkpoint)
    store_checkpoint(record, checkpoint, folder)
    try_tokenizer(record.tokenizer, folder, job.config.frontend.checkpoint)
    note_peak(folder)
