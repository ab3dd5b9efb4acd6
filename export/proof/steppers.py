"""Two implementations of a graph call behind one interface: the static torch model and onnxruntime on the graphs."""

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray

from export.checkpoints.checkpoint import Checkpoint
from export.onnx_graphs.graphs import OnnxGraphs
from export.onnx_graphs.ort_values import ort_value
from export.static_model.model import StaticModel, constants
from export.weights.table import load, specs
from runtime.artifact.caches import cache_format
from runtime.artifact.manifest import IDS, POSITIONS, ModelConfig
from runtime.artifact.schemes import TokenRounding
from runtime.artifact.tensor_file import bits_dtype

Logits = NDArray[np.float32]


class Stepper(Protocol):
    """One implementation with its caches."""

    def reset(self, rows: int) -> None:
        """Take empty caches for so many sequences (B)."""

    def step(self, ids: NDArray[np.int64], first: NDArray[np.int64]) -> Logits:
        """Feed ids (B, T) at positions first .. first + T - 1 of each row, with first (B,).

        Negative positions are padding. Returns the logits (B, vocab), or another head's outputs, after the last token.
        """


def positions(first: NDArray[np.int64], tokens: int) -> NDArray[np.int64]:
    """Consecutive positions (B, T) from each row's first."""
    return first[:, None] + np.arange(tokens)


class TorchStepper:
    """The static model on real tensors."""

    def __init__(self, model: StaticModel, cache_dtype: str) -> None:
        """`cache_dtype`: of the numbers in the caches, as in signatures."""
        self.model, self.format = model, cache_format(cache_dtype)
        self.caches: list[torch.Tensor] = []

    def reset(self, rows: int) -> None:
        """As `Stepper.reset`."""
        c = self.model.config
        self.caches = [
            torch.zeros((rows, c.n_kv_heads, length, part.width), dtype=getattr(torch, part.dtype))
            for length in self.model.cache_lens
            for part in self.format.parts(c.head_dim)
            for _side in ("key", "value")
        ]

    def step(self, ids: NDArray[np.int64], first: NDArray[np.int64]) -> Logits:
        """As `Stepper.step`."""
        return self.outputs(ids, first)[:, -1]

    def outputs(self, ids: NDArray[np.int64], first: NDArray[np.int64]) -> NDArray[np.float32]:
        """As `Stepper.step` for any T, with all of the head's outputs.

        They are (B, T, n_outputs), or (B, 1, n_outputs) if the head gives only those of the last token.
        """
        with torch.no_grad():
            outputs, *self.caches = self.model(
                torch.from_numpy(ids), torch.from_numpy(positions(first, ids.shape[1])), *self.caches
            )
        found: NDArray[np.float32] = outputs.numpy()
        return found


class OnnxStepper:
    """onnxruntime on the exported graphs, not optimized, since that is inexact for DequantizeLinear before MatMul."""

    def __init__(self, graphs: OnnxGraphs) -> None:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        self.graphs = {(graph.rows, graph.tokens): graph for graph in graphs.record.graphs}
        self.sessions = {
            (graph.rows, graph.tokens): onnxruntime.InferenceSession(
                str(graphs.onnx_path(graph)), options, providers=["CPUExecutionProvider"]
            )
            for graph in graphs.record.graphs
        }
        self.dtypes: dict[str, str] = {}
        self.caches: dict[str, NDArray[np.generic]] = {}

    def reset(self, rows: int) -> None:
        """As `Stepper.reset`."""
        graph = next(graph for (taken, _), graph in self.graphs.items() if taken == rows)
        self.dtypes = {spec.name: spec.dtype for spec in graph.signature.caches}
        self.caches = {spec.name: np.zeros(spec.shape, bits_dtype(spec.dtype)) for spec in graph.signature.caches}

    def step(self, ids: NDArray[np.int64], first: NDArray[np.int64]) -> Logits:
        """As `Stepper.step`."""
        past = {name: ort_value(columns, self.dtypes[name]) for name, columns in self.caches.items()}
        feed = {IDS: ids, POSITIONS: positions(first, ids.shape[1]), **past}
        logits, *present = self.sessions[ids.shape].run(None, feed)
        self.caches = dict(zip(self.caches, present, strict=True))
        found: Logits = logits[:, -1]
        return found


def static_model(
    config: ModelConfig,
    cache_len: int,
    weights: dict[str, NDArray[np.float32]],
    rounded: Mapping[str, TokenRounding] | None = None,
) -> StaticModel:
    """The static model with these weights; every parameter must be given. For `rounded`, see `round_products`."""
    cache_lens = config.cache_lens(cache_len)
    with torch.device("meta"):
        model = StaticModel(config, cache_lens).eval()
    tensors = {name: torch.from_numpy(values) for name, values in {**weights, **constants(config, cache_lens)}.items()}
    model.load_state_dict(tensors, strict=True, assign=True)
    model.round_products(rounded or {})
    return model


def checkpoint_weights(checkpoint: Checkpoint) -> dict[str, NDArray[np.float32]]:
    """All weights of the checkpoint, in float32."""
    return {name: checkpoint.tensor(name).astype(np.float32) for name in checkpoint.names()}


def stored_weights(graphs: OnnxGraphs) -> dict[str, NDArray[np.float32]]:
    """All weights as the graphs compute with them: stored by the scheme, then widened to float32."""
    source = graphs.weights()
    return {
        tensor.name: load(tensor, {spec.name: source.read(spec.name) for spec in specs(tensor)})
        for tensor in graphs.record.tensors
    }
