"""The export stage: YAML and checkpoint to ONNX graphs over one shared weight file."""

from pathlib import Path

import torch

from export.checkpoints.checkpoint import Checkpoint
from export.configuration.config import CompileConfig
from export.console import byte_bar, step_bar
from export.onnx_graphs.graphs import RECORD_FILE, WEIGHTS_FILE, GraphsRecord, OnnxGraphs
from export.onnx_graphs.quantize import store
from export.onnx_graphs.to_onnx import export_graph
from export.plan import export_record
from export.static_model.model import StaticModel, constants
from runtime.artifact import manifest
from runtime.artifact.tensor_file import TensorFile, TensorFileWriter, tensor_bytes


def export_model(config: CompileConfig, checkpoint: Checkpoint, folder: Path) -> OnnxGraphs:
    """Fill `folder` with the graphs, their weights and the tokenizer."""
    record = export_record(config, checkpoint)
    write_weights(checkpoint, record, folder / WEIGHTS_FILE)
    write_tokenizer(checkpoint, folder, record)
    trace_graphs(record, folder)
    (folder / RECORD_FILE).write_bytes(manifest.encode(record))
    return OnnxGraphs(folder, record)


def write_weights(checkpoint: Checkpoint, record: GraphsRecord, path: Path) -> None:
    """Read, quantize and store every tensor, a few rows at a time."""
    total = sum(tensor_bytes(spec) for spec in record.weights)
    with TensorFileWriter(path, record.weights) as writer, byte_bar("storing weights", total) as bar:
        for tensor in record.tensors:
            for block in checkpoint.blocks(tensor.name):
                for stored_name, array in store(tensor, block.astype("float32", copy=False)).items():
                    writer.write(stored_name, array)
                    bar.advance(array.nbytes)


def write_tokenizer(checkpoint: Checkpoint, folder: Path, record: GraphsRecord) -> None:
    """Put the tokenizer and its chat template beside the graphs."""
    source, spec = checkpoint.tokenizer, record.tokenizer
    if source is None or spec is None:
        return
    (folder / spec.file).write_bytes(source.data)
    if source.chat_template is not None and spec.chat_template is not None:
        (folder / spec.chat_template).write_text(source.chat_template)


def trace_graphs(record: GraphsRecord, folder: Path) -> None:
    """Trace the static model once for each graph."""
    cache_lens = record.model.cache_lens(record.shape.cache_len)
    with torch.device("meta"):
        model = StaticModel(record.model, cache_lens).eval()
    values = constants(record.model, cache_lens)
    weights = TensorFile.open(folder / WEIGHTS_FILE)
    with step_bar("tracing graphs", len(record.graphs)) as bar:
        for graph in record.graphs:
            export_graph(model, record, graph, values, weights, folder / f"{graph.name}.onnx")
            bar.advance(1)
