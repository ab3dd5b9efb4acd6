"""The second half of the export stage: traces the static model once for each graph, over weights already stored."""

from pathlib import Path

import torch

from export.console import step_bar
from export.onnx_graphs.graphs import ONNX_SUFFIX, RECORD_PREFIX, GraphsRecord, OnnxGraphs
from export.onnx_graphs.to_onnx import export_graph
from export.static_model.model import StaticModel, constants
from export.weights.stored import WEIGHTS_FILE, StoredWeights
from runtime.artifact import manifest
from runtime.artifact.durable import write_whole
from runtime.artifact.tensor_file import TensorFile


def trace_over(stored: StoredWeights, record: GraphsRecord, path: Path) -> OnnxGraphs:
    """Trace the graphs of a record beside their stored weights, and write the record to `path`.

    Graphs with another key are removed first.
    """
    for old in (*stored.folder.glob(f"{RECORD_PREFIX}*"), *stored.folder.glob(f"*{ONNX_SUFFIX}")):
        old.unlink()
    trace_graphs(record, stored.folder)
    write_whole(path, manifest.to_json(record))
    return OnnxGraphs(path, record)


def trace_graphs(record: GraphsRecord, folder: Path) -> None:
    """Trace the static model once for each graph, over the weight file in `folder`."""
    cache_lens = record.model.cache_lens(record.shape.cache_len)
    with torch.device("meta"):
        model = StaticModel(record.model, cache_lens).eval()
    values = constants(record.model, cache_lens)
    weights = TensorFile.open(folder / WEIGHTS_FILE)
    with step_bar("tracing graphs", len(record.graphs)) as bar:
        for graph in record.graphs:
            export_graph(model, record, graph, values, weights, folder / f"{graph.name}{ONNX_SUFFIX}")
            bar.advance(1)
