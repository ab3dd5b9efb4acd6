"""`python -m export.golden yaml/x.yaml`: compute golden prompts for an exported model.

The static torch model answers them, with the weights as stored. Only one layer's weights are in memory at a time, so
even a model that does not fit on this machine gets golden prompts.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from export.configuration.config import config_parser
from export.console import console, step_bar
from export.job import Job
from export.onnx_graphs.graphs import OnnxGraphs
from export.proof.steppers import TorchStepper
from export.results import GOLDEN_STAGE, golden_key, graphs_path
from export.static_model.model import StaticModel, constants
from export.weights.table import load, specs
from export.workspace import locked, locked_stage, run_stage
from runtime.artifact.golden import GOLDEN_FILE, GoldenPrompt, sequence_length, tensors_of
from runtime.artifact.manifest import HEADS, ModelConfig, Shape, TensorSpec
from runtime.artifact.tensor_file import TensorFileWriter
from runtime.errors import run_command

SHORT = 5  # tokens in the first prompt; the second is longer than the smallest cache or chunk
STEPS = 4  # greedy tokens after each prompt
SEED = 20261122


def main() -> int:
    """Write the config's golden prompts into its workspace and return the exit status."""
    arguments = config_parser("Compute golden prompts.").parse_args()
    job = Job.load(arguments.config, arguments.overrides)
    with locked(job.workspace, console.print), locked_stage(job.workspace, GOLDEN_STAGE, console.print):
        graphs = OnnxGraphs.open(graphs_path(job))
        run_stage(
            job.workspace,
            GOLDEN_STAGE,
            golden_key(job.config),
            lambda folder: write_golden(golden_prompts(graphs), folder / GOLDEN_FILE),
        )
    return 0


def write_golden(prompts: list[GoldenPrompt], path: Path) -> None:
    """Write the file that `runtime.artifact.golden.read_golden` reads."""
    tensors = tensors_of(prompts)
    specs_of = [
        TensorSpec(name=name, shape=array.shape, dtype="int64" if array.dtype == np.int64 else "float32")
        for name, array in tensors.items()
    ]
    with TensorFileWriter(path, specs_of) as writer:
        for name, array in tensors.items():
            writer.write(name, array)


def golden_prompts(graphs: OnnxGraphs) -> list[GoldenPrompt]:
    """Random prompts of two lengths, one longer than the smallest cache if that is short, with their answers."""
    record = graphs.record
    lengths, steps = prompt_lengths(record.model, record.shape)
    generator = np.random.default_rng(SEED)
    prompts = [generator.integers(record.model.vocab_size, size=n) for n in lengths]
    with step_bar("golden prompts", (1 + steps) * record.model.n_layers) as bar:
        stepper = TorchStepper(streamed_model(graphs, lambda: bar.advance(1)), record.cache_dtype)
        stepper.reset(len(prompts))
        longest = max(lengths)
        padded = np.stack([np.pad(ids, (longest - len(ids), 0)) for ids in prompts])
        first = np.array([n - longest for n in lengths])
        answers = [stepper.outputs(padded, first)]
        chosen: list[NDArray[np.int64]] = []
        for step in range(steps):
            chosen.append(answers[-1][:, -1].argmax(-1))
            answers.append(stepper.outputs(chosen[-1][:, None], first + longest + step))
    every_token = HEADS[record.model.head].every_token
    return [
        GoldenPrompt(
            ids,
            np.concatenate([answer[row, -len(ids) if every_token else -1 :] for answer in answers]),
            np.array([ids_of_rows[row] for ids_of_rows in chosen], np.int64),
        )
        for row, ids in enumerate(prompts)
    ]


def prompt_lengths(model: ModelConfig, shape: Shape) -> tuple[list[int], int]:
    """The length of each prompt, and how many tokens to generate after the longest: no more than the caches hold."""
    most = STEPS if model.generates else 0
    if model.every_layer_windowed:
        return [SHORT, sequence_length(model, shape, None)], most
    longest = sequence_length(model, shape, max(1, shape.cache_len - most))
    return [min(SHORT, longest), longest], min(most, shape.cache_len - longest)


def streamed_model(graphs: OnnxGraphs, after_layer: Callable[[], object]) -> StaticModel:
    """The static model, each part of which reads its weights when it is called and releases them afterwards."""
    record, stored = graphs.record, graphs.weights()
    cache_lens = record.model.cache_lens(record.shape.cache_len)
    with torch.device("meta"):
        model = StaticModel(record.model, cache_lens).eval()
    model.load_state_dict(
        {name: torch.from_numpy(values) for name, values in constants(record.model, cache_lens).items()},
        strict=False,
        assign=True,
    )
    model.round_products(graphs.rounded_weights())

    def read(part: nn.Module, name: str) -> None:
        weights = {
            tensor.name.removeprefix(f"{name}."): torch.from_numpy(
                load(tensor, {spec.name: stored.read(spec.name) for spec in specs(tensor)})
            )
            for tensor in record.tensors
            if tensor.name.startswith(f"{name}.")
        }
        part.load_state_dict(weights, strict=True, assign=True)

    def stream(part: nn.Module, name: str) -> None:
        part.register_forward_pre_hook(lambda *_: read(part, name))
        part.register_forward_hook(lambda *_: part.to("meta") and None)

    for i, block in enumerate(model.layers):
        stream(block, f"layers.{i}")
        block.register_forward_hook(lambda *_: after_layer())
    for name in ("tok_embeddings", "norm", "output"):
        if name == "tok_embeddings" and record.model.tied_embeddings:
            read(model.tok_embeddings, name)  # `finish` reads it again, as the head
        elif hasattr(model, name):
            stream(getattr(model, name), name)
    return model


if __name__ == "__main__":
    run_command(main)
