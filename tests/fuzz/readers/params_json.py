"""The params.json of a folder in Mistral's own format."""

import json
from functools import partial
from pathlib import Path

from safetensors.numpy import save_file

from tests.fuzz.mutations import ABSURD, spoil_json
from tests.fuzz.reader import Reader, place
from tests.fuzz.tiny_files import MISTRAL, PARAMS, opened, tensors, write_mistral

MOE = {"moe": {"num_experts": 10**9, "num_experts_per_tok": 2}}
MINISTRAL3 = {
    "yarn": {"factor": 16, "original_max_position_embeddings": 32, "beta": 32, "alpha": 1, "apply_scale": True},
    "llama_4_scaling": {"beta": 0.1, "original_max_position_embeddings": 32},
    "quantization": {"qformat_weight": "fp8_e4m3"},
    "vision_encoder": {"hidden_size": 8},
}


def open_reader(folder: Path) -> Reader:
    checkpoint = write_mistral(folder / "checkpoint")
    weights = tensors(MISTRAL)
    save_file(weights, checkpoint / "consolidated.safetensors")
    seeds = [json.dumps(PARAMS | other).encode() for other in ({}, MOE, MINISTRAL3, {"sliding_window": None})]
    absurd = (*ABSURD, [8], [None], [None] * 5000, 4096, 10**9)
    known = {"a billion experts": json.dumps(PARAMS | MOE).encode()}
    return Reader(seeds, partial(spoil_json, absurd=absurd), partial(check, checkpoint, weights), known)


def check(checkpoint, weights, data: bytes) -> None:
    place(checkpoint / "params.json", data)
    opened(checkpoint, "mistral", weights)
