"""8-bit floats as published: every number times its scale, in float32."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from export.checkpoints.checkpoint import open_checkpoint
from runtime.errors import UserError
from tests.helpers.raw_mistral import raw_of_transformers
from tests.helpers.tiny import write_tiny_mistral

LARGEST = 448.0  # of e4m3
FP8 = {"quant_method": "fp8", "activation_scheme": "static", "modules_to_not_convert": ["lm_head"]}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("float8") / "tiny"
    write_tiny_mistral(folder, hidden_size=128, intermediate_size=256, dtype=torch.bfloat16)
    return folder


def quantized(weight: torch.Tensor, grid: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """8-bit floats (N, K) and a scale for each of a grid of blocks."""
    rows, columns = (size // n for size, n in zip(weight.shape, grid, strict=True))
    blocks = weight.float().reshape(grid[0], rows, grid[1], columns)
    scale = blocks.abs().amax((1, 3), keepdim=True) / LARGEST
    return (blocks / scale).to(torch.float8_e4m3fn).reshape(weight.shape), scale.reshape(grid)


def write_float8(source: Path, folder: Path, kind: str) -> Path:
    """The checkpoint with the layers' matrices in 8 bits: a scale for a matrix, for each row or for each block."""
    shutil.copytree(source, folder)
    tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        tensors[name] = tensor
        if "_proj" in name:
            rows, columns = tensor.shape
            grid = {"matrix": (1, 1), "rows": (rows, 1), "blocks": (rows // 32, columns // 32)}[kind]
            tensors[name], scale = quantized(tensor, grid)
            tensors[f"{name}_scale_inv"] = scale.reshape(()).to(torch.bfloat16) if kind == "matrix" else scale
            tensors[name.replace(".weight", ".activation_scale")] = torch.tensor(1.5)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    block = [32, 32] if kind == "blocks" else None
    (folder / "config.json").write_text(
        json.dumps(config | {"quantization_config": FP8 | {"weight_block_size": block}})
    )
    return folder


@pytest.mark.parametrize("kind", ["matrix", "rows", "blocks"])
def test_numbers_are_those_of_the_definition(tiny, tmp_path, kind):
    folder = write_float8(tiny, tmp_path / "x", kind)
    stored = load_file(folder / "model.safetensors")
    ours = open_checkpoint(folder, "auto", {})

    def exact(name: str) -> np.ndarray:
        weight = stored[f"model.layers.1.{name}.weight"].float()
        scale = stored[f"model.layers.1.{name}.weight_scale_inv"].float().reshape(-1, 1)
        if kind == "blocks":
            scale = stored[f"model.layers.1.{name}.weight_scale_inv"]
            scale = scale.repeat_interleave(32, 0).repeat_interleave(32, 1)
        return (weight * scale).numpy()

    assert np.array_equal(ours.tensor("layers.1.attention.wo.weight"), exact("self_attn.o_proj"))
    w13 = np.concatenate([exact("mlp.gate_proj"), exact("mlp.up_proj")])
    assert np.array_equal(ours.tensor("layers.1.feed_forward.w13.weight"), w13)
    assert ours.dtype("output.weight") == "bfloat16"  # what is no 8-bit float stays as it is
    kinds = {
        "matrix": "with a scale for each matrix",
        "rows": "with a scale for each row",
        "blocks": "in blocks of 32 x 32",
    }
    kept, left_out = ours.notes
    assert kept == f"FP8 {kinds[kind]}: 14 matrices, whose numbers and scales quantize.scheme: source keeps as they are"
    assert left_out == "scales of activations and caches are left out (14): both stay as they are computed"


def test_the_quantization_config_of_another_tool_describes_them(tiny, tmp_path):
    folder = write_float8(tiny, tmp_path / "x", "rows")
    config = json.loads((folder / "config.json").read_text())
    said = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": said}))
    assert open_checkpoint(folder, "auto", {}).notes[0].startswith("FP8 with a scale for each row: 14 matrices")


def test_a_file_pickled_by_torch_holds_the_same_model(tiny, tmp_path):
    folder = write_float8(tiny, tmp_path / "x", "matrix")
    expected = open_checkpoint(folder, "auto", {})
    pickled = shutil.copytree(folder, tmp_path / "pickled")
    torch.save(load_file(folder / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    ours = open_checkpoint(pickled, "auto", {})
    assert all(np.array_equal(ours.tensor(name), expected.tensor(name)) for name in expected.names())


@pytest.mark.parametrize("kind", ["matrix", "blocks"])
def test_transformers_reads_the_same_numbers(tiny, tmp_path, kind):
    folder = write_float8(tiny, tmp_path / "x", kind)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    ours = open_checkpoint(folder, "auto", {})
    for i in range(2):
        qkv = torch.cat([theirs[f"model.layers.{i}.self_attn.{x}_proj.weight"] for x in "qkv"])
        assert qkv.dtype == torch.float32
        assert np.array_equal(ours.tensor(f"layers.{i}.attention.wqkv.weight"), qkv.numpy())


def test_mistrals_own_format_holds_the_same_model(tiny, tmp_path):
    """Its names differ, and its rotary rows are neighbours."""
    folder = write_float8(tiny, tmp_path / "x", "matrix")
    raw = tmp_path / "raw"
    raw.mkdir()
    stored = load_file(folder / "model.safetensors")
    state = {name: tensor for name, tensor in stored.items() if name.endswith(".weight")}
    bits = {n: t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t for n, t in state.items()}
    own = {}
    for name, tensor in raw_of_transformers(bits, 4, 2).items():
        own[name] = tensor.view(torch.float8_e4m3fn) if tensor.dtype == torch.uint8 else tensor
    for name, tensor in stored.items():
        for suffix, theirs in (("weight_scale_inv", "qscale_weight"), ("activation_scale", "qscale_act")):
            if name.endswith(suffix):
                (renamed,) = raw_of_transformers({name.replace(suffix, "bias"): tensor}, 4, 2)
                own[renamed.replace("bias", theirs)] = tensor
    save_file(own, raw / "consolidated.safetensors")
    params = {
        "dim": 128, "n_layers": 2, "head_dim": 16, "hidden_dim": 256, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-5,
        "vocab_size": 320, "rope_theta": 1e4, "quantization": {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"},
        "q_lora_rank": None,
    }  # fmt: skip
    (raw / "params.json").write_text(json.dumps(params))
    ours, expected = open_checkpoint(raw, "auto", {}), open_checkpoint(folder, "auto", {})
    assert ours.names() == expected.names()
    assert all(np.array_equal(ours.tensor(name), expected.tensor(name)) for name in ours.names())


Q = "model.layers.0.self_attn.q_proj.weight"
DAMAGE = {
    "holds 8-bit floats and has 0 scales, expected one named": lambda t: t.pop(f"{Q}_scale_inv"),
    "holds 8-bit floats and has 2 scales": lambda t: t.update({f"{Q}_scale": torch.ones(())}),
    "has the shape (3,) and dtype float32, expected floats in a grid": lambda t: t.update(
        {f"{Q}_scale_inv": torch.ones(3)}
    ),
    "has the shape () and dtype int32": lambda t: t.update({f"{Q}_scale_inv": torch.tensor(1, dtype=torch.int32)}),
    "has the shape (1, 1, 1)": lambda t: t.update({f"{Q}_scale_inv": torch.ones(1, 1, 1)}),
    "holds a NaN or an infinite number in row 2": lambda t: t[Q].view(torch.uint8)[2].fill_(0x7F),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_what_has_no_meaning_is_refused(tiny, tmp_path, message):
    folder = write_float8(tiny, tmp_path / "x", "matrix")
    tensors = load_file(folder / "model.safetensors")
    DAMAGE[message](tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError) as caught:
        open_checkpoint(folder, "auto", {}).tensor("layers.0.attention.wqkv.weight")
    assert message in str(caught.value)
    assert Q.removesuffix(".weight") in str(caught.value)


def test_blocks_have_the_size_that_the_configuration_gives(tiny, tmp_path):
    """192 rows in blocks of 128 are 128 and 64 rows, not twice 96; scales of a cache carry nothing for us."""
    folder = tmp_path / "x"
    write_tiny_mistral(folder, intermediate_size=192, dtype=torch.float32)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.gate_proj.weight"
    scale = torch.tensor([[0.002], [0.004]])
    each = scale.repeat_interleave(128, 0)[:192]
    eight = (tensors[name] / each).to(torch.float8_e4m3fn)
    one = torch.tensor(1.0)
    scales = {
        f"{name}_scale_inv": scale,
        "model.layers.0.self_attn.k_scale": one,
        "model.layers.0.self_attn.v_scale": one.clone(),
    }
    save_file(tensors | {name: eight} | scales, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    block = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    (folder / "config.json").write_text(json.dumps(config | block))
    ours = open_checkpoint(folder, "auto", {}).tensor("layers.0.feed_forward.w13.weight")[:192]
    assert np.array_equal(ours, (eight.float() * each).numpy())
