"""The export stage: turns a checkpoint into stored weights, and traces ONNX graphs over them.

Each result has a key and is made only once.
"""

from functools import partial
from pathlib import Path

from export.console import console
from export.job import Job
from export.onnx_graphs.graphs import CONTENTS_SUFFIX, OnnxGraphs, record_path
from export.peak_memory import note_peak
from export.results import WEIGHTS_STAGE, graphs_key, graphs_record, open_configured, weights_key, weights_record
from export.weights.stored import StoredWeights
from export.weights.storing import store_checkpoint
from export.workspace import is_whole, locked, locked_stage, run_stage, seal


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


def _store(job: Job, folder: Path) -> None:
    checkpoint = open_configured(job.config)
    for note in checkpoint.notes:
        console.print(f"warning: {note}", style="yellow")
    record = weights_record(job.config, checkpoint)
    graphs_record(job.config, record)  # before any work: it refuses sizes that no kernel can index
    store_checkpoint(record, checkpoint, folder)
    note_peak(folder)
