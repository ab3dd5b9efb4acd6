"""`python -m export.trace FOLDER`: trace the graphs of a record that lies there, with weights of zeros that take no disk.

For a model of known sizes without a checkpoint: what is compiled from it is checked and timed with random weights.
"""

import argparse
from pathlib import Path

from export.onnx_graphs.graphs import WEIGHTS_FILE, OnnxGraphs
from export.pipeline import trace_graphs
from runtime.artifact.tensor_file import TensorFileWriter
from runtime.errors import run_command


def main() -> int:
    """Trace; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m export.trace", description="Trace the graphs of a record.")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where the record lies, and where the graphs go")
    folder = parser.parse_args().folder
    record = OnnxGraphs.open(folder).record
    with TensorFileWriter(folder / WEIGHTS_FILE, record.weights) as writer:
        writer.leave_zero()
    trace_graphs(record, folder)
    return 0


if __name__ == "__main__":
    run_command(main)
