from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from export.checkpoints import checkpoint as checkpoint_module
from export.checkpoints.checkpoint import Checkpoint, check_tensors
from export.checkpoints.families import FAMILIES, Family
from export.checkpoints.hyperparameters import model_config
from export.checkpoints.source import Opened
from export.checkpoints.tensor_layout import weights
from export.checkpoints.tensors.pth_file import PthTensors
from export.checkpoints.tensors.safetensors_source import SafetensorsSource
from runtime.artifact.manifest import ModelConfig
from runtime.artifact.tensor_file import TensorFile
from runtime.errors import UserError

EXPERTS, HIDDEN, DIM = 3, 6, 8
VALUES = {
    "hidden_size": DIM,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 5,
    "rms_norm_eps": 1e-5,
    "rope_type": "default",
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": 2,
}
EACH_EXPERT = FAMILIES["huggingface"]["mixtral"]
W13, W2 = "layers.{i}.feed_forward.experts.w13.weight", "layers.{i}.feed_forward.experts.w2.weight"


def with_experts(w13: tuple[str, ...], w2: str) -> Family:
    return replace(EACH_EXPERT, sources={**EACH_EXPERT.sources, W13: w13, W2: (w2,)})


STACKED = with_experts(("layers.{i}.w1", "layers.{i}.w3"), "layers.{i}.w2")  # w1 (experts, hidden, dim), ...
FUSED = with_experts(("layers.{i}.w13", "layers.{i}.w13"), "layers.{i}.w2")  # w13 (experts, 2 hidden, dim)


def model() -> ModelConfig:
    return model_config(EACH_EXPERT, VALUES, {}, "x")


def expert_tensors() -> dict[str, torch.Tensor]:
    """Random tensors with one matrix for each expert."""
    torch.manual_seed(0)
    parts = [part for weight in weights(EACH_EXPERT, model()).values() for part in weight.parts]
    return {part.source: torch.randn(part.source_shape) for part in parts}


def stack(tensors: dict[str, torch.Tensor], family: Family) -> dict[str, torch.Tensor]:
    """The same experts as `family` names them."""
    kept = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for i in range(2):
        first, second, third = (
            torch.stack([tensors[f"model.layers.{i}.block_sparse_moe.experts.{e}.w{k}.weight"] for e in range(EXPERTS)])
            for k in (1, 2, 3)
        )
        kept[f"layers.{i}.w2"] = second
        if family is FUSED:
            kept[f"layers.{i}.w13"] = torch.cat([first, third], dim=1)
        else:
            kept |= {f"layers.{i}.w1": first, f"layers.{i}.w3": third}
    return {name: tensor.contiguous() for name, tensor in kept.items()}


def opened(tensors: dict[str, torch.Tensor], family: Family, path: Path) -> Opened:
    if path.suffix == ".pth":
        torch.save(tensors, path)
        return Opened(family, VALUES, "x", PthTensors.open([path]), None)
    save_file(tensors, path)
    return Opened(family, VALUES, "x", SafetensorsSource(TensorFile.open(path)), None)


@pytest.mark.parametrize("file", ["x.safetensors", "x.pth"])
@pytest.mark.parametrize("family", [STACKED, FUSED], ids=["stacked", "fused"])
def test_stacked_experts_are_those_of_each_file(tmp_path, monkeypatch, family, file):
    tensors = expert_tensors()
    source = opened(stack(tensors, family), family, tmp_path / file)
    layout = weights(family, model())
    check_tensors(source, layout, set(), tmp_path)
    monkeypatch.setattr(checkpoint_module, "BLOCK_ELEMENTS", 2 * DIM)  # blocks end within an expert
    ours = Checkpoint(model(), None, 0, layout, source.source)
    for i in range(2):
        experts = [f"model.layers.{i}.block_sparse_moe.experts.{e}" for e in range(EXPERTS)]
        w13 = torch.cat([tensors[f"{expert}.w{k}.weight"] for expert in experts for k in (1, 3)])
        w2 = torch.cat([tensors[f"{expert}.w2.weight"] for expert in experts])
        assert np.array_equal(ours.tensor(W13.format(i=i)), w13.numpy())
        assert np.array_equal(ours.tensor(W2.format(i=i)), w2.numpy())
    assert max(block.size for block in ours.blocks(W13.format(i=0))) == 2 * DIM


@pytest.mark.parametrize("family", [EACH_EXPERT, STACKED, FUSED], ids=["each", "stacked", "fused"])
def test_every_row_is_used_once(family):
    used = Counter(
        (part.source, row)
        for weight in weights(family, model()).values()
        for part in weight.parts
        for row in range(part.first_row, part.first_row + part.shape[0])
    )
    shapes = {part.source: part.source_shape for w in weights(family, model()).values() for part in w.parts}
    every = {(name, row) for name, shape in shapes.items() for row in range(np.prod(shape[:-1] or shape, dtype=int))}
    assert set(used) == every
    assert set(used.values()) == {1}


def test_a_stack_of_another_shape_is_refused(tmp_path):
    tensors = stack(expert_tensors(), STACKED)
    tensors["layers.1.w3"] = tensors["layers.1.w3"].reshape(EXPERTS * HIDDEN, DIM)
    source = opened(tensors, STACKED, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"layers.1.w3 has shape \(18, 8\), expected \(3, 6, 8\) by x"):
        check_tensors(source, weights(STACKED, model()), set(), tmp_path)
