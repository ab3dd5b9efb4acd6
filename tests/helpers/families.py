"""One tiny checkpoint for each model and checkpoint form of the family, written by software that is not ours."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MinistralConfig,
    MinistralForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from tests.helpers.raw_mistral import MOE, PARAMS, raw_tensors, write_raw

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


def _raw(changes: Mapping[str, Any], pth_files: int, folder: Path) -> None:
    params = {**PARAMS, **changes}
    write_raw(folder, params, raw_tensors(params), pth_files=pth_files)


mistral = partial(partial, _save, MistralForCausalLM, MistralConfig)
ministral = partial(partial, _save, MinistralForCausalLM, MinistralConfig)
mixtral = partial(partial, _save, MixtralForCausalLM, MixtralConfig)
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
    "raw": FamilyRow("Mistral's own format, safetensors, one window", raw({"sliding_window": WINDOW}, 0)),
    "raw-ministral": FamilyRow(
        "Mistral's own format, .pth, interleaved windows",
        raw({"n_layers": 4, "_sliding_window": [None, WINDOW, WINDOW, WINDOW]}, 2),
    ),
    "raw-mixtral": FamilyRow("Mistral's own format, mixture of experts", raw({"n_layers": 1, "moe": MOE}, 0)),
}
