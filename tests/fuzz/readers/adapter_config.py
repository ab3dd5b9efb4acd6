"""The adapter_config.json of a LoRA adapter, which is merged into a Hugging Face folder."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from export.checkpoints.checkpoint import open_checkpoint
from tests.fuzz.mutations import ABSURD, spoil_json
from tests.fuzz.reader import Reader, demand, place
from tests.fuzz.tiny_files import DIM, HUGGINGFACE, tensors, write_huggingface

RANK = 2
MODULE = "model.layers.0.self_attn.o_proj"
OURS = "layers.0.attention.wo.weight"
CONFIG: dict[str, Any] = {
    "peft_type": "LORA", "r": RANK, "lora_alpha": 4, "use_rslora": False, "use_dora": False, "bias": "none",
    "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"o_proj": 8}, "init_lora_weights": True, "fan_in_fan_out": False,
    "target_modules": ["o_proj"], "base_model_name_or_path": "mistralai/Mistral-7B-v0.1", "layer_replication": None,
}  # fmt: skip


def open_reader(folder: Path) -> Reader:
    checkpoint = write_huggingface(folder / "checkpoint")
    adapter = folder / "adapter"
    adapter.mkdir()
    rng = np.random.default_rng(1)
    down, up = rng.standard_normal((RANK, DIM), np.float32), rng.standard_normal((DIM, RANK), np.float32)
    name = f"base_model.model.{MODULE}"
    save_file({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, adapter / "adapter_model.safetensors")
    known = {"a pattern without end": json.dumps(CONFIG | {"alpha_pattern": {"(.*)*" * 20: 1}}).encode()}
    absurd = (*ABSURD, {"o_proj": 1e300}, {"(a+)+$": 1}, {"o_proj$|": 3}, "pissa", "ADALORA", ["o_proj"])
    seeds = [json.dumps(CONFIG).encode(), json.dumps(CONFIG | {"use_rslora": True, "alpha_pattern": {}}).encode()]
    return Reader(seeds, partial(spoil_json, absurd=absurd), partial(check, checkpoint, adapter, up @ down), known)


def check(checkpoint: Path, adapter: Path, product: np.ndarray, data: bytes) -> None:
    place(adapter / "adapter_config.json", data)
    merged = open_checkpoint(checkpoint, "huggingface", {}, adapter=adapter).tensor(OURS)
    base = tensors(HUGGINGFACE)[f"{MODULE}.weight"]
    change = (merged.astype(np.float64) - base) / product
    rounding = np.abs(np.maximum(np.abs(base), np.abs(merged)) / product) * 2.0**-20
    demand(bool((np.abs(change - np.median(change)) <= rounding + 1e-5).all()), "the change is no multiple of B @ A")
