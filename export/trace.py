"""`python -m export.trace RECORD`: trace the graphs of a record beside it, over zero weights that take no disk space.

For a model of known sizes without a checkpoint: its compiled form is checked and timed with random weights.
"""

import argparse
from pathlib import Path

from export.onnx_graphs.graphs import OnnxGraphs
from export.onnx_graphs.tracing import trace_graphs
from export.weights.stored import WEIGHTS_FILE
from runtime.artifact.tensor_file import TensorFileWriter
from runtime.errors import run_command


def main() -> int:
    """Trace the graphs and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m export.trace", description="Trace the graphs of a record.")
    parser.add_argument("record", type=Path, metavar="RECORD", help="the record's file; the graphs go beside it")
    graphs = OnnxGraphs.open(parser.parse_args().record)
    with TensorFileWriter(graphs.folder / WEIGHTS_FILE, graphs.record.weights) as writer:
        writer.leave_zero()
    trace_graphs(graphs.record, graphs.folder)
    return 0


if __name__ == "__main__":
    run_command(main)
