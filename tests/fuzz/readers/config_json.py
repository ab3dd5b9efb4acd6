"""The config.json of a Hugging Face folder."""

import json
from functools import partial
from pathlib import Path

import msgspec

from runtime.artifact.manifest import ModelConfig
from tests.fuzz.mutations import ABSURD, spoil_json
from tests.fuzz.reader import Reader, demand, place
from tests.fuzz.tiny_files import CONFIG, HUGGINGFACE, opened, tensors, write_huggingface

# The parts of other models of the family, which a change may fill in.
OTHERS = [
    {"layer_types": ["sliding_attention"]},
    {"model_type": "mixtral", "num_local_experts": 10**9, "num_experts_per_tok": 2},
    {"architectures": ["MistralForSequenceClassification"], "id2label": {"0": "a", "1": "b"}},
    {"architectures": ["MistralForTokenClassification"], "num_labels": 2**31},
    {"rope_scaling": {"rope_type": "linear", "factor": 2}},
    {"rope_scaling": {"rope_type": "yarn", "factor": 2, "original_max_position_embeddings": 32, "mscale": 1.0}},
    {"rope_scaling": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 32}},
    {"model_type": "ministral3", "rope_parameters": None},
    {"quantization_config": {"bits": 4}},
]


def open_reader(folder: Path) -> Reader:
    checkpoint = write_huggingface(folder / "checkpoint")
    seeds = [json.dumps(CONFIG | other).encode() for other in ({}, *OTHERS)]
    absurd = (*ABSURD, "mixtral", "ministral", "llama", [8], [None] * 5000, ["full_attention"], 4096, 10**9)
    known = {
        "a billion experts": json.dumps(CONFIG | OTHERS[1]).encode(),
        "four thousand layers": json.dumps(CONFIG | {"num_hidden_layers": 4096}).encode(),
    }
    return Reader(seeds, partial(spoil_json, absurd=absurd), partial(check, checkpoint, tensors(HUGGINGFACE)), known)


def check(checkpoint, weights, data: bytes) -> None:
    place(checkpoint / "config.json", data)
    found = opened(checkpoint, "huggingface", weights)
    again = msgspec.json.decode(msgspec.json.encode(found.model), type=ModelConfig)
    demand(again == found.model, "the model is not what its manifest will say")
