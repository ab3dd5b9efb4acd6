"""`python -m build.tools.random_checkpoint FOLDER [--shape 7b] [--layers 2]`: write a checkpoint of random weights.

It has the Hugging Face format, and serves to measure the compile of a large model without its weights: shapes, dtype,
sharding and names are the real ones, but the text that it generates is not.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from export.checkpoints import families, tensor_layout
from export.checkpoints.checkpoint import Checkpoint
from export.checkpoints.encodings.encoding import EncodedRows, Encoding
from export.checkpoints.huggingface.folder import describe
from export.checkpoints.hyperparameters import model_config as checked_config
from export.checkpoints.source import Array, SourceTensor
from export.console import byte_bar
from runtime.artifact.manifest import ModelConfig, TensorSpec
from runtime.artifact.tensor_file import TensorFileWriter
from runtime.errors import UserError, run_command

BLOCK = 2**20  # random numbers, repeated as often as a tensor needs
STANDARD_DEVIATION = 0.02  # initializer_range of Mistral
SEED = 0

SEVEN_B: Mapping[str, Any] = {  # Mistral-7B-Instruct-v0.2
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "sliding_window": None,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
}

SHAPES: Mapping[str, Mapping[str, Any]] = {  # contents of config.json at full depth; a new shape is a row
    "7b": SEVEN_B,
    "7b-v0.1": {**SEVEN_B, "sliding_window": 4096, "rope_theta": 1e4},  # Mistral-7B-v0.1
    "ministral-8b": {  # Ministral-8B-Instruct-2410, with the windows of its params.json
        "architectures": ["MinistralForCausalLM"],
        "model_type": "ministral",
        "num_hidden_layers": 36,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e8,
        "sliding_window": 32768,
        "layer_types": ["full_attention", *["sliding_attention"] * 3] * 9,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
    },
    "ministral-3-8b": {  # Ministral-3-8B-Instruct-2512, the text model; its rotary settings are the type's default
        "architectures": ["Ministral3ForCausalLM"],
        "model_type": "ministral3",
        "num_hidden_layers": 34,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 131072,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
        "max_position_embeddings": 262144,
        "tie_word_embeddings": False,
    },
    "mistral-small-24b": {  # Mistral-Small-3.2-24B-Instruct-2506, the text model
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "num_hidden_layers": 40,
        "hidden_size": 5120,
        "intermediate_size": 32768,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e9,
        "sliding_window": None,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
    },
    "mixtral-8x7b": {  # Mixtral-8x7B-Instruct-v0.1
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 32000,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "sliding_window": None,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "1.1b": {  # TinyLlama-1.1B
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "num_hidden_layers": 22,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "vocab_size": 32000,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "sliding_window": None,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    },
    "tiny": {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "num_hidden_layers": 8,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 320,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "sliding_window": 32,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
    },
}


def model_config(shape: str, layers: int) -> tuple[families.Family, ModelConfig]:
    """The family and the model that a shape of `SHAPES` describes, at a depth of `layers`."""
    return described(_at_depth(shape, layers), {}, shape)


def described(
    config: Mapping[str, Any], overrides: Mapping[str, object], where: str
) -> tuple[families.Family, ModelConfig]:
    """The family and the model of a config.json."""
    found = describe(config, where)
    return found.family, checked_config(found.family, found.values, overrides, where, found.rotary)


@dataclass(frozen=True)
class _Headers:
    """Tensors of which only name, shape and dtype are known."""

    tensors: Mapping[str, SourceTensor]

    def read(self, name: str, rows: slice) -> Array:
        """Never called: nothing reads the weights of a checkpoint that has only headers."""
        raise AssertionError(f"{name} has no data to read {rows} of")


@dataclass(frozen=True)
class _EncodedHeader:
    """A quantized matrix of which only the encoding is known."""

    encoding: Encoding

    def read(self, rows: slice) -> EncodedRows:
        """Never called, as `_Headers.read`."""
        raise AssertionError(f"a matrix in {self.encoding} has no data to read {rows} of")


def headers(
    shape: str, overrides: Mapping[str, object], layers: int | None = None, encoding: Encoding | None = None
) -> Checkpoint:
    """The checkpoint that a shape of `SHAPES` describes, at full depth or with `layers` layers.

    It is in bfloat16; with an encoding, the matrices of its layers are quantized. It has no files, no data and no
    tokenizer.
    """
    values = SHAPES[shape] if layers is None else _at_depth(shape, layers)
    family, model = described(values, overrides, shape)
    layout = tensor_layout.weights(family, model)
    tensors = {
        part.source: _header(part.source_shape, encoding if name.startswith("layers.") else None)
        for name, weight in layout.items()
        for part in weight.parts
    }
    return Checkpoint(model, None, sum(tensor.nbytes for tensor in tensors.values()), layout, _Headers(tensors))


def _header(shape: tuple[int, ...], encoding: Encoding | None) -> SourceTensor:
    if encoding is None or len(shape) == 1:
        return SourceTensor(shape, "bfloat16", 2 * prod(shape))
    return SourceTensor(shape, "float32", prod(shape), _EncodedHeader(encoding), encoding.numbers)


def _at_depth(shape: str, layers: int) -> dict[str, Any]:
    """The keys of config.json at a depth; the pattern of layer types, if a shape has one, is repeated or cut."""
    values = {**SHAPES[shape], "num_hidden_layers": layers}
    if "layer_types" in values:
        values["layer_types"] = (values["layer_types"] * -(-layers // len(values["layer_types"])))[:layers]
    return values


def write_random_checkpoint(folder: Path, shape: str, layers: int) -> None:
    """Write config.json and bfloat16 shards, one per layer and one for the rest; holds one tensor at a time."""
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty, expected a new folder; name another one")
    folder.mkdir(parents=True, exist_ok=True)
    shards = shards_of(shape, layers)
    files = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    block = random_block()
    nbytes = sum(2 * prod(spec.shape) for specs in shards for spec in specs)
    with byte_bar("writing random weights", nbytes) as bar:
        for file, specs in zip(files, shards, strict=True):
            with TensorFileWriter(folder / file, specs, {"format": "pt"}) as writer:
                for spec in specs:
                    values = random_values(spec.shape, block)
                    writer.write(spec.name, values)
                    bar.advance(values.nbytes)
    weight_map = {spec.name: file for file, specs in zip(files, shards, strict=True) for spec in specs}
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": nbytes}, "weight_map": weight_map})
    dtype_and_activation = {"torch_dtype": "bfloat16", "hidden_act": "silu"}
    _write_json(folder / "config.json", {**dtype_and_activation, **_at_depth(shape, layers)})


def shards_of(shape: str, layers: int) -> list[list[TensorSpec]]:
    """Tensors by shard, under their names in the families table; those outside the layers come first."""
    grouped: dict[str, list[TensorSpec]] = defaultdict(list)
    for name, weight in tensor_layout.weights(*model_config(shape, layers)).items():
        key = name.split(".")[1] if name.startswith("layers.") else ""
        grouped[key] += [TensorSpec(name=part.source, shape=part.shape, dtype="bfloat16") for part in weight.parts]
    return list(grouped.values())


def random_block() -> NDArray[Any]:
    """The numbers of every matrix, in bfloat16."""
    values = np.random.default_rng(SEED).standard_normal(BLOCK, np.float32) * np.float32(STANDARD_DEVIATION)
    return values.astype(ml_dtypes.bfloat16)


def random_values(shape: tuple[int, ...], block: NDArray[Any]) -> NDArray[Any]:
    """A norm's ones, or the random block repeated."""
    return np.ones(shape, block.dtype) if len(shape) == 1 else np.resize(block, shape)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


def main() -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m build.tools.random_checkpoint", description="Write a checkpoint of random weights."
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="new or empty folder")
    parser.add_argument("--shape", choices=SHAPES, default="7b", help="sizes of the model (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=2, metavar="N", help="number of layers (default: %(default)s)")
    arguments = parser.parse_args()
    write_random_checkpoint(arguments.folder, arguments.shape, arguments.layers)
    print(arguments.folder)
    return 0


if __name__ == "__main__":
    run_command(main)
