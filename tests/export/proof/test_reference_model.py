"""The reference of `make parity` has the weights of a compile, also in forms that transformers does not read itself."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import load_file, save_file

from export.checkpoints.checkpoint import open_checkpoint
from export.proof.reference_model import load_reference
from tests.helpers.gguf_files import write_gguf
from tests.helpers.quantized_checkpoints import FORMS, write_quantized
from tests.helpers.tiny import write_tiny_mistral

O_PROJ = "model.layers.0.self_attn.o_proj"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("reference") / "tiny"
    write_tiny_mistral(folder, dtype=torch.bfloat16)
    return folder


def test_with_an_adapter(tiny, tmp_path):
    down, up = torch.randn(4, 64), torch.randn(64, 4)
    prefix = f"base_model.model.{O_PROJ}.lora_"
    save_file({f"{prefix}A.weight": down, f"{prefix}B.weight": up}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 8}')
    model = open_checkpoint(tiny, "auto", {}).model
    plain = load_reference(tiny, "auto", model).state_dict()
    merged = load_reference(tiny, "auto", model, tmp_path).state_dict()
    name = f"{O_PROJ}.weight"
    expected = (plain[name] + 2 * up @ down).bfloat16().float()
    torch.testing.assert_close(merged[name], expected, rtol=2**-8, atol=0)
    assert all(torch.equal(merged[other], plain[other]) for other in plain if other != name)


@pytest.mark.parametrize("form", ["numbered", "wrapped"])
def test_forms_that_transformers_does_not_read(tiny, tmp_path, form):
    folder = Path(shutil.copytree(tiny, tmp_path / "other"))
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    name, prefix = ("model.safetensors", "module.") if form == "wrapped" else ("model-00001-of-00001.safetensors", "")
    save_file({prefix + key: tensor for key, tensor in state.items()}, folder / name)
    model = open_checkpoint(tiny, "auto", {}).model
    expected = load_reference(tiny, "auto", model).state_dict()
    found = load_reference(folder, "auto", model).state_dict()
    assert_same(found, expected)


def test_a_quantization_config_that_stayed_behind(tiny, tmp_path):
    folder = Path(shutil.copytree(tiny, tmp_path / "other"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    model = open_checkpoint(folder, "auto", {}).model
    assert_same(load_reference(folder, "auto", model).state_dict(), load_reference(tiny, "auto", model).state_dict())


@pytest.mark.parametrize("form", ["gptq-4", "mlx-4", "fp8-blocks"])
def test_quantized_weights_are_the_floats_that_they_mean(tmp_path, form):
    """With settings that name a method, with some that name none, and as transformers itself reads them."""
    write_tiny_mistral(
        tmp_path / "tiny", hidden_size=128, intermediate_size=256, num_hidden_layers=1, dtype=torch.bfloat16
    )
    exact = write_quantized(tmp_path / "tiny", tmp_path / "x", FORMS[form])
    model = open_checkpoint(tmp_path / "x", "auto", {}).model
    found = load_reference(tmp_path / "x", "auto", model).state_dict()
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert all(np.array_equal(found[name].numpy(), expected) for name, expected in exact.items())


@pytest.mark.parametrize("split", [0, 8], ids=["whole", "parts"])
def test_a_folder_with_a_gguf(tmp_path, split):
    write_tiny_mistral(tmp_path / "tiny", intermediate_size=128)
    (tmp_path / "x").mkdir()
    write_gguf(tmp_path / "x" / "x.gguf", tmp_path / "tiny", GGMLQuantizationType.F32, split=split, vocab_size=320)
    model = open_checkpoint(tmp_path / "x", "auto", {}).model
    expected = load_reference(tmp_path / "tiny", "auto", model).state_dict()
    assert_same(load_reference(tmp_path / "x", "auto", model).state_dict(), expected)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
