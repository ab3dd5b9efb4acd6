"""Rounds a model's 4-bit tensors layer by layer, by what its layers compute on the calibration rows."""

from collections.abc import Mapping
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from export.calibration.layers import Layers, prefix
from export.calibration.methods import METHODS, Method, searched
from export.calibration.moments import Moments
from export.calibration.results import LayerResults, RoundingError
from export.calibration.rounding import rounded
from export.checkpoints.checkpoint import Checkpoint
from export.console import step_bar
from export.weights.format import ModelTensor
from export.weights.rules import HEAD_WEIGHTS
from export.weights.stored import WeightsRecord
from export.weights.table import load
from runtime.artifact.tensor_file import TensorFile


def calibrated(
    checkpoint: Checkpoint, record: WeightsRecord, ids: NDArray[np.int64], results: LayerResults
) -> tuple[list[TensorFile], list[RoundingError]]:
    """The rounded tensors of all layers, and the errors of each; finished layers in `results` are not computed again.

    `ids` (rows, length) are the calibration rows. Raises `UserError` as `rounded` does.
    """
    assert record.quantization.method is not None
    method = METHODS[record.quantization.method]
    steps = _steps(record)
    layers = Layers(checkpoint, ids, record.rounded_weights)
    first, states = _start(results, len(steps), layers)
    with step_bar("rounding to 4 bits", len(steps)) as bar:
        bar.advance(first)
        for step in range(first, len(steps)):
            if step < record.model.n_layers:
                states = _round_layer(layers, step, steps[step], states, results, method)
            else:
                _round_head(layers, steps[step], states, results, method)
            bar.advance(1, _note(results.errors(step)))
    files = [file for file in map(results.tensors, range(len(steps))) if file is not None]
    return files, [error for step in range(len(steps)) for error in results.errors(step)]


def _steps(record: WeightsRecord) -> list[list[ModelTensor]]:
    """The tensors to round in each layer and, behind the last layer, in the head; nothing behind the last of them."""
    tensors = searched(record)
    steps = [[t for t in tensors if t.name.startswith(prefix(layer))] for layer in range(record.model.n_layers)]
    steps.append([t for t in tensors if t.name in HEAD_WEIGHTS])
    while steps and not steps[-1]:
        steps.pop()
    return steps


def _start(results: LayerResults, steps: int, layers: Layers) -> tuple[int, torch.Tensor]:
    """The first step to compute and the states that enter it: the latest that are kept behind finished layers."""
    finished = next((step for step in range(steps) if not results.finished(step)), steps)
    if finished == steps:
        return steps, torch.empty(0)
    for step in range(finished, 0, -1):
        states = results.states(step)
        if states is not None:
            return step, states
    return 0, layers.embedded()


def _round_layer(
    layers: Layers, layer: int, tensors: list[ModelTensor], states: torch.Tensor, results: LayerResults, method: Method
) -> torch.Tensor:
    """Round a layer, keep the result, and return the states that enter the next one.

    If the method solves, these come from the rounded layer, so that later layers make up for its errors too.
    """
    weights = layers.weights(layer)
    moments = {tensor.name: Moments(method.solves) for tensor in tensors}
    after = layers.run(layer, weights, states, partial(_observe, moments))
    found = {}
    # The largest first: its second moments take the most memory while they are solved, and are then gone.
    for tensor in sorted(tensors, key=lambda tensor: -tensor.shape[1]):
        found[tensor.name] = rounded(tensor, [weights[tensor.name]], moments.pop(tensor.name), method)
        if method.solves:
            weights[tensor.name] = load(tensor, found[tensor.name].arrays)
    if method.solves:
        after = layers.run(layer, weights, states)
    results.save(layer, tensors, [found[tensor.name] for tensor in tensors])
    results.save_states(layer + 1, after)
    return after


def _observe(moments: Mapping[str, Moments], weight: str, inputs: torch.Tensor) -> None:
    if weight in moments:
        moments[weight].add(inputs)


def _round_head(
    layers: Layers, tensors: list[ModelTensor], states: torch.Tensor, results: LayerResults, method: Method
) -> None:
    found = []
    for tensor in tensors:
        moments = Moments(method.solves)
        for inputs in layers.head_inputs(tensor.name, states).split(states.shape[1]):
            moments.add(inputs)
        blocks = (block.astype(np.float32, copy=False) for block in layers.checkpoint.blocks(tensor.name))
        found.append(rounded(tensor, blocks, moments, method))
    results.save(layers.checkpoint.model.n_layers, tensors, found)


def _note(errors: list[RoundingError]) -> str:
    """The errors of a layer, as the progress bar shows them."""
    kinds = (f"{error.tensor.removesuffix('.weight').rpartition('.')[2]} {error.error:.1%}" for error in errors)
    return "error: " + ", ".join(kinds) if errors else ""
