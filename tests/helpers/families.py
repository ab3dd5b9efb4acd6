"""One tiny checkpoint for each model and checkpoint form of the family, written by software that is not ours."""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Ministral3Config,
    Ministral3ForCausalLM,
    MinistralConfig,
    MinistralForCausalLM,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PixtralVisionConfig,
)

from tests.helpers.gguf_files import write_gguf
from tests.helpers.raw_mistral import MOE, PARAMS, raw_tensors, write_raw
from tests.helpers.tiny import DEFAULTS

WINDOW = 8
SIZES: Mapping[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # ten times the usual value, so that the logits of random weights differ from each other
}
ORIGINAL = "original_max_position_embeddings"
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, ORIGINAL: 16}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, ORIGINAL: 32}
# The factor of queries changes at every fourth position, so that each length of the proof has several.
MINISTRAL3_ROPE = {
    "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, ORIGINAL: 4, "mscale": 1.0, "mscale_all_dim": 1.0,
    "beta_fast": 32.0, "beta_slow": 1.0, "llama_4_scaling_beta": 0.25,
}  # fmt: skip
RAW_YARN = {"factor": 16.0, ORIGINAL: 4, "beta": 32.0, "alpha": 1.0, "apply_scale": False}
PATTERN = ["full_attention", "sliding_attention", "sliding_attention", "sliding_attention"]


@dataclass(frozen=True)
class FamilyRow:
    """A checkpoint of the family: how it is written, and what the README calls the model."""

    model: str
    write: Callable[[Path], object]


def _save(model_class: Any, config_class: Any, changes: Mapping[str, Any], folder: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(config_class(**{**SIZES, **changes}))
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):  # ones by default, which would hide the loss of a norm's weight
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
        model.save_pretrained(folder)


def _save_with_images(text: Any, tied: bool, folder: Path) -> None:
    """A model that also sees images, with a tiny image encoder."""
    images = PixtralVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    _save(
        Mistral3ForConditionalGeneration,
        lambda **_sizes: Mistral3Config(text_config=text, vision_config=images, tie_word_embeddings=tied),
        {},
        folder,
    )


def _raw(changes: Mapping[str, Any], pth_files: int, folder: Path) -> None:
    params = {**PARAMS, **changes}
    write_raw(folder, params, raw_tensors(params), pth_files=pth_files)


def _gguf_ministral3(folder: Path) -> None:
    """A Ministral 3 as llama.cpp's converter writes it: an architecture of its own, and matrices as Q8_0."""
    sizes = {**DEFAULTS, "intermediate_size": 128, "sliding_window": None, "rope_parameters": MINISTRAL3_ROPE}
    with tempfile.TemporaryDirectory() as source:
        _save(Ministral3ForCausalLM, Ministral3Config, sizes, Path(source))
        folder.mkdir()
        write_gguf(
            folder / "model.gguf", Path(source), GGMLQuantizationType.Q8_0, architecture="mistral3",
            **{
                "rope.freq_base": 1e6, "rope.scaling.type": "yarn", "rope.scaling.factor": 16.0,
                "rope.scaling.original_context_length": 4, "rope.scaling.yarn_log_multiplier": 1.0,
                "attention.temperature_scale": 0.25,
            },
        )  # fmt: skip


mistral = partial(partial, _save, MistralForCausalLM, MistralConfig)
ministral = partial(partial, _save, MinistralForCausalLM, MinistralConfig)
mixtral = partial(partial, _save, MixtralForCausalLM, MixtralConfig)
llama = partial(partial, _save, LlamaForCausalLM, LlamaConfig)
raw = partial(partial, _raw)

FAMILIES: Mapping[str, FamilyRow] = {
    "mistral-v0.1": FamilyRow("Mistral-7B-v0.1, Instruct v0.1: one window", mistral({"sliding_window": WINDOW})),
    "mistral-v0.2": FamilyRow(
        "Mistral-7B-Instruct-v0.2, v0.3: no window, theta 1e6",
        mistral({"sliding_window": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    ),
    "nemo": FamilyRow(
        "Mistral-Nemo: head_dim is not dim / n_heads",
        mistral({"sliding_window": None, "head_dim": 12, "hidden_size": 40}),
    ),
    "ministral": FamilyRow(
        "Ministral-8B: one full layer to three with a window",
        ministral({"sliding_window": WINDOW, "num_hidden_layers": 4, "layer_types": PATTERN}),
    ),
    "mixtral": FamilyRow(
        "Mixtral-8x7B: 8 experts, 2 for each token", mixtral({"num_local_experts": 8, "num_experts_per_tok": 2})
    ),
    "ministral-3": FamilyRow(
        "Ministral 3: YaRN, queries scaled by position, tied head, an image encoder that is left out",
        partial(
            _save_with_images,
            Ministral3Config(**{**SIZES, "tie_word_embeddings": True, "rope_parameters": MINISTRAL3_ROPE}),
            True,
        ),
    ),
    "mistral-small-3": FamilyRow(
        "Mistral Small 3.1 and 3.2, Magistral, Devstral: theta 1e9, an image encoder that is left out",
        partial(
            _save_with_images,
            MistralConfig(**{**SIZES, "sliding_window": None, "rope_parameters": {"rope_theta": 1e9}}),
            False,
        ),
    ),
    "yarn": FamilyRow(
        "YaRN of long-context fine-tunes, with its factor of cosines and sines",
        mistral({"sliding_window": None, "rope_parameters": {"rope_theta": 1e4, **YARN}}),
    ),
    "llama-3": FamilyRow(
        "Llama-shaped models with Llama 3's scaled frequencies",
        llama({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}}),
    ),
    "linear": FamilyRow(
        "Fine-tunes with linearly scaled positions, one window",
        mistral(
            {"sliding_window": WINDOW, "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}
        ),
    ),
    "raw-ministral-3": FamilyRow(
        "Mistral's own format, YaRN and queries scaled by position",
        raw({"rope_theta": 1e6, "yarn": RAW_YARN, "llama_4_scaling": {"beta": 0.25, ORIGINAL: 4}}, 0),
    ),
    "gguf-ministral-3": FamilyRow("GGUF of the architecture mistral3, Q8_0", _gguf_ministral3),
    "raw": FamilyRow("Mistral's own format, safetensors, one window", raw({"sliding_window": WINDOW}, 0)),
    "raw-ministral": FamilyRow(
        "Mistral's own format, .pth, interleaved windows",
        raw({"n_layers": 4, "_sliding_window": [None, WINDOW, WINDOW, WINDOW]}, 2),
    ),
    "raw-mixtral": FamilyRow("Mistral's own format, mixture of experts", raw({"n_layers": 1, "moe": MOE}, 0)),
}
