"""The export stage: turns a checkpoint into stored weights, and traces ONNX graphs over them.

Each result has a key and is made only once.
"""

from functools import partial
from pathlib import Path

from export.checkpoints.tokenizers.chat import tokenizer_notes
from export.console import console
from export.job import Job
from export.memory_use import check_graphs_memory, check_storing_memory
from export.onnx_graphs.graphs import CONTENTS_SUFFIX, OnnxGraphs, record_path
from export.peak_memory import note_peak
from export.results import WEIGHTS_STAGE, graphs_key, graphs_record, open_configured, weights_key, weights_record
from export.tokenizer_trial import try_tokenizer
from export.weights.stored import StoredWeights, WeightsRecord
from export.weights.storing import store_weights, write_tokenizer
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
    record = weights_record(job.config, checkpoint)
    where = job.config.frontend.checkpoint
    check_special_ids(record, where)
    check_storing_memory(checkpoint, record)
    check_graphs_memory(graphs_record(job.config, record))
    write_tokenizer(checkpoint, record, folder)
    try_tokenizer(record, folder, where)
    store_weights(record, checkpoint, folder)
    note_peak(folder)
