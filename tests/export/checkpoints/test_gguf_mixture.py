from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file
from transformers import MixtralConfig, MixtralForCausalLM

from export.checkpoints import checkpoint as checkpoint_module
from export.checkpoints.checkpoint import open_checkpoint
from runtime.errors import UserError
from tests.helpers.gguf_files import write_mixture

EXPERTS = 3


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gguf") / "mixtral"
    config = MixtralConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 20000.0},
        max_position_embeddings=512,
        initializer_range=0.2,
    )
    MixtralForCausalLM(config).save_pretrained(folder)
    return folder


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in load_file(folder / "model.safetensors").items()}


@pytest.mark.parametrize("merged", [True, False], ids=["merged", "each"])
def test_the_model_is_that_of_the_folder(mixtral, tmp_path, monkeypatch, merged):
    write_mixture(
        tmp_path / "x.gguf",
        tensors_of(mixtral),
        GGMLQuantizationType.F32,
        merged=merged,
        expert_count=EXPERTS,
        expert_used_count=2,
    )
    monkeypatch.setattr(checkpoint_module, "BLOCK_ELEMENTS", 50 * 64)  # blocks end within an expert
    ours, theirs = open_checkpoint(tmp_path / "x.gguf", "auto", {}), open_checkpoint(mixtral, "auto", {})
    assert ours.model.n_experts == EXPERTS
    for field in theirs.model.__struct_fields__:
        expected = np.float32(1e-5) if field == "norm_eps" else getattr(theirs.model, field)  # GGUF holds it as float32
        assert getattr(ours.model, field) == expected, field
    assert ours.names() == theirs.names()
    for name in theirs.names():
        assert np.array_equal(ours.tensor(name), theirs.tensor(name)), name
    experts = "layers.0.feed_forward.experts.w13.weight"
    assert max(block.size for block in ours.blocks(experts)) <= 50 * 64


def test_merged_experts_may_be_quantized(mixtral, tmp_path):
    packing = GGMLQuantizationType.Q4_1
    tensors = tensors_of(mixtral)
    keys = {"expert_count": EXPERTS, "expert_used_count": 2}
    write_mixture(tmp_path / "x.gguf", tensors, packing, merged=True, **keys)
    ours = open_checkpoint(tmp_path / "x.gguf", "auto", {}).tensor("layers.1.feed_forward.experts.w2.weight")
    expected = [tensors[f"model.layers.1.block_sparse_moe.experts.{e}.w2.weight"] for e in range(EXPERTS)]
    assert np.array_equal(ours, np.concatenate([dequantize(quantize(w2, packing), packing) for w2 in expected]))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"expert_count": 4, "expert_used_count": 2}, r"gate_inp.weight has shape \(3, 64\), expected \(4, 64\)"),
        ({"expert_count": 3}, "lacks expert_used_count"),
        ({"expert_count": 3, "expert_used_count": 4}, "gives each token 4 of 3 experts"),
        ({"expert_count": 10**6, "expert_used_count": 2}, "does not describe a model: Expected `int` <= 1024"),
        ({}, "holds the tensor blk.0.ffn_down_exps.weight|lacks the tensor blk.0.ffn_gate.weight"),
    ],
)
def test_experts_that_do_not_fit_are_refused(mixtral, tmp_path, keys, said):
    write_mixture(tmp_path / "x.gguf", tensors_of(mixtral), GGMLQuantizationType.F32, merged=True, **keys)
    with pytest.raises(UserError, match=said):
        open_checkpoint(tmp_path / "x.gguf", "auto", {})
