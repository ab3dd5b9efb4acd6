"""`python -m build.bench.rival_onnxruntime GRAPHS WORKLOAD THREADS`: time onnxruntime once on exported graphs, as JSON.

It is used in its best ordinary way: default graph optimizations, the same number of threads, and caches that stay where
they are, since outputs are bound to the buffers that are the next call's inputs.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from export.onnx_graphs.graphs import OnnxGraphs
from export.onnx_graphs.ort_values import ort_value
from runtime.artifact.tensor_file import bits_dtype
from runtime.bench import Measured, Workload, cache_bytes, measure, weight_bytes
from runtime.errors import run_command
from runtime.process_memory import peak_memory

Array = NDArray[Any]


class OnnxruntimeEngine:
    """Exported graphs under onnxruntime, as `runtime.bench.TimedEngine` of one text.

    Two sets of caches take turns: a call reads one and writes all of the other, as the graph says. Every input and
    output is bound once to a numpy array, so that a call copies nothing but what the graph itself copies.
    """

    batch = 1

    def __init__(self, graphs: OnnxGraphs, threads: int) -> None:
        self.record = graphs.record
        self.position = 0
        decode = next(graph for graph in self.record.graphs if (graph.rows, graph.tokens) == (1, 1))
        self._caches = [
            [np.zeros(spec.shape, bits_dtype(spec.dtype)) for spec in decode.signature.caches] for _ in range(2)
        ]
        self._current = 0  # the set that holds the past
        used = (self.record.graphs[0], decode)  # the largest chunk is enough: it accepts padding
        self._calls = {graph.tokens: _BoundGraph(graphs, graph.name, self._caches, threads) for graph in used}

    def room(self) -> int | None:
        """How many more tokens fit in the caches; None if every layer has a window."""
        return None if self.record.model.every_layer_windowed else self.record.shape.cache_len - self.position

    def reset(self) -> None:
        """Forget everything; the mask of every later position hides what is still in the caches."""
        self.position = 0

    def prefill(self, prompts: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Append token ids to the text, which is empty; returns logits (1, vocab) after the last."""
        assert self.position == 0, "the graphs take padding only before a text"
        ids = np.array(prompts, np.int64)
        chunk = max(self._calls)
        sizes = [chunk] * -(-ids.shape[1] // chunk)
        padded = np.pad(ids, ((0, 0), (sum(sizes) - ids.shape[1], 0)))
        position = self.position + ids.shape[1] - padded.shape[1]
        logits = np.empty(0, np.float32)
        for size in sizes:
            logits, padded = self._run(padded[:, :size], position), padded[:, size:]
            position += size
        self.position = position
        return logits

    def decode(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Append one token id; returns logits (1, vocab)."""
        logits = self._run(np.array(ids, np.int64)[:, None], self.position)
        self.position += 1
        return logits

    def _run(self, ids: NDArray[np.int64], position: int) -> NDArray[np.float32]:
        logits = self._calls[ids.shape[1]].run(self._current, ids, position)
        self._current = 1 - self._current
        return logits


class _BoundGraph:
    """One graph's session, bound for both directions between the two sets of caches."""

    def __init__(self, graphs: OnnxGraphs, name: str, caches: list[list[Array]], threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3  # errors only
        graph = next(graph for graph in graphs.record.graphs if graph.name == name)
        self._session = onnxruntime.InferenceSession(
            graphs.onnx_path(graph), options, providers=["CPUExecutionProvider"]
        )
        self._ids, self._positions = (np.zeros(spec.shape, np.int64) for spec in graph.signature.call)
        self._logits = np.zeros(graph.signature.outputs[0].shape, np.float32)
        inputs, outputs = graph.signature.inputs, graph.signature.outputs
        self._bindings = []
        for past, present in (caches, reversed(caches)):
            binding = self._session.io_binding()
            for spec, array in zip(inputs, [self._ids, self._positions, *past], strict=True):
                binding.bind_ortvalue_input(spec.name, ort_value(array, spec.dtype))
            for spec, array in zip(outputs, [self._logits, *present], strict=True):
                binding.bind_ortvalue_output(spec.name, ort_value(array, spec.dtype))
            self._bindings.append(binding)

    def run(self, past: int, ids: NDArray[np.int64], position: int) -> NDArray[np.float32]:
        """Run one call on token ids (1, T) from `position` on; returns logits (1, vocab).

        It reads the set of caches `past` and writes the other.
        """
        self._ids[...] = ids
        self._positions[...] = position + np.arange(ids.shape[1])
        self._session.run_with_iobinding(self._bindings[past])
        return self._logits[:, 0].copy()


def main(graphs: str, workload: str, threads: str) -> int:
    """Time the graphs of a record file and print `Measured` as JSON; weights count with their stored size."""
    opened = OnnxGraphs.open(Path(graphs))
    record = opened.record
    weights = weight_bytes(record.weights, tied=record.model.tied_embeddings)
    caches = record.graphs[-1].signature.caches
    windows = record.model.cache_lens(record.shape.cache_len)
    engine = OnnxruntimeEngine(opened, int(threads))
    asked = msgspec.json.decode(workload, type=Workload)
    speeds = measure(engine, record.model.vocab_size, asked, lambda n: weights + cache_bytes(caches, windows, n))
    print(msgspec.json.encode(Measured(speeds, peak_memory() / 1e6)).decode())
    return 0


if __name__ == "__main__":
    run_command(lambda: main(*sys.argv[1:]))
