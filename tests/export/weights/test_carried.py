"""Quantized matrices of a checkpoint, stored with `quantize.scheme: source` and loaded again, keep every value."""

from pathlib import Path

import numpy as np
import pytest
import torch

from export.checkpoints.checkpoint import open_checkpoint
from export.weights.storing import carrying_notes, record_of, write_weights
from export.weights.table import load, specs
from runtime.artifact.manifest import Quantization
from runtime.artifact.tensor_file import TensorFile
from tests.helpers.quantized_checkpoints import FORMS, write_quantized
from tests.helpers.tiny import write_tiny_mistral

PARTS = {
    "layers.0.attention.wqkv.weight": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "layers.0.attention.wo.weight": ("self_attn.o_proj",),
    "layers.0.feed_forward.w13.weight": ("mlp.gate_proj", "mlp.up_proj"),
    "layers.0.feed_forward.w2.weight": ("mlp.down_proj",),
}
ROUNDED = ("nf4", "nf4-nested", "fp4", "mlx-8")  # to int8, with a scale for each row


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("carried") / "tiny"
    write_tiny_mistral(
        folder, hidden_size=128, intermediate_size=256, num_hidden_layers=1, vocab_size=300, dtype=torch.bfloat16
    )
    return folder


@pytest.mark.parametrize("form", FORMS)
def test_loaded_values_are_those_of_the_checkpoint(tiny, tmp_path, form):
    exact = write_quantized(tiny, tmp_path / "x", FORMS[form])
    checkpoint = open_checkpoint(tmp_path / "x", "auto", {})
    record = record_of(checkpoint, Quantization(scheme="source"), "fp32", {})
    write_weights(checkpoint, record, tmp_path / "weights.safetensors")
    file = TensorFile.open(tmp_path / "weights.safetensors")
    tensors = {tensor.name: tensor for tensor in record.tensors}
    for name, parts in PARTS.items():
        tensor = tensors[name]
        found = load(tensor, {spec.name: file.read(spec.name) for spec in specs(tensor)})
        expected = np.concatenate([exact[f"model.layers.0.{part}.weight"] for part in parts])
        assert tensor.carried == (form not in ROUNDED)
        if tensor.carried:
            assert np.array_equal(found, expected)
        else:  # half a step of the 127 up to the largest of the row, and a rounding of the scale and of the product
            limit = np.abs(expected).max(axis=1, keepdims=True) * (1 / 254 + 2**-23)
            assert (np.abs(found - expected) <= limit).all()


def test_what_cannot_be_carried_is_told_with_its_cost(tiny, tmp_path):
    write_quantized(tiny, tmp_path / "x", FORMS["nf4"])
    checkpoint = open_checkpoint(tmp_path / "x", "auto", {})
    (note,) = carrying_notes(record_of(checkpoint, Quantization(scheme="source"), "fp32", {}), checkpoint)
    assert "layers.0.attention.wqkv.weight and 3 more, stored as NF4, cannot be carried and become int8" in note
    assert "1/254" in note
    assert carrying_notes(record_of(checkpoint, Quantization(scheme="none"), "fp32", {}), checkpoint) == ()
