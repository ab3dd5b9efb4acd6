"""The index of a checkpoint in several safetensors files."""

import json
from functools import partial
from pathlib import Path

from safetensors.numpy import save_file

from tests.fuzz.mutations import ABSURD, spoil_json
from tests.fuzz.reader import Reader, place
from tests.fuzz.tiny_files import HUGGINGFACE, opened, tensors, write_huggingface

INDEX = "model.safetensors.index.json"
LONG = "x" * 300 + ".safetensors"
PATHS = (
    "../model.safetensors", "/etc/passwd", "./a.safetensors", "b/../a.safetensors", "b.safetensors\0", "x" * 5000, LONG,
    "x/" * 5000 + "x.safetensors",
)  # fmt: skip


def open_reader(folder: Path) -> Reader:
    checkpoint = write_huggingface(folder / "checkpoint")
    (checkpoint / "model.safetensors").rename(folder / "model.safetensors")
    weights = tensors(HUGGINGFACE)
    shards = {"a.safetensors": list(weights)[::2], "b.safetensors": list(weights)[1::2]}
    for shard, held in shards.items():
        save_file({name: weights[name] for name in held}, checkpoint / shard)
    weight_map = {name: shard for shard, held in shards.items() for name in held}
    seed = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}).encode()
    absurd = (*ABSURD, *PATHS, *shards)
    known = {"a name too long for a file": json.dumps({"weight_map": {"lm_head.weight": LONG}}).encode()}
    return Reader([seed], partial(spoil_json, absurd=absurd), partial(check, checkpoint, weights), known)


def check(checkpoint, weights, data: bytes) -> None:
    place(checkpoint / INDEX, data)
    opened(checkpoint, "huggingface", weights)
