"""Quantized checkpoints whose parts do not fit together are refused in one sentence that names the tensor."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from export.checkpoints.checkpoint import open_checkpoint
from runtime.errors import UserError
from tests.helpers.quantized_checkpoints import FORMS, write_quantized
from tests.helpers.tiny import write_tiny_mistral

UP = "model.layers.0.mlp.up_proj"  # 256 x 128
WEIGHT = f"{UP}.weight"
INT32 = {"dtype": torch.int32}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Gives the folder of a checkpoint in a form, written once."""
    folder = tmp_path_factory.mktemp("quantized")
    write_tiny_mistral(
        folder / "tiny", hidden_size=128, intermediate_size=256, num_hidden_layers=1, vocab_size=300,
        dtype=torch.bfloat16,
    )  # fmt: skip

    def of(form: str) -> Path:
        if not (folder / form).exists():
            write_quantized(folder / "tiny", folder / form, FORMS[form])
        return folder / form

    return of


def without(ending):
    return lambda tensors: tensors.pop(f"{UP}.{ending}")


def replaced(ending, value):
    return lambda tensors: tensors.update({f"{UP}.{ending}": value})


def cell(ending, value, at=(0, 3)):
    """Set one number: by default that of row 3 in the first group of GPTQ and AWQ."""

    def change(tensors):
        tensors[f"{UP}.{ending}"][at] = value

    return change


def order(change):
    return lambda tensors: change(tensors[f"{UP}.g_idx"])


# The form, what is done to its tensors, and what the error says.
TENSORS = [
    ("gptq-4", without("scales"), f"lacks the tensor {UP}.scales, without which {WEIGHT} has no values"),
    ("gptq-4", without("qzeros"), f"lacks the tensor {UP}.qzeros"),
    ("gptq-4", replaced("scales", torch.ones(4, 255)), f"{UP}.scales has the shape (4, 255) and dtype float32, "
     "expected the shape (4, 256) for 4 groups of 256 rows"),
    ("gptq-4", replaced("scales", torch.ones(4, 256, **INT32)), f"{UP}.scales has the shape (4, 256) and dtype int32"),
    ("gptq-4", replaced("qzeros", torch.ones(4, 31, **INT32)), f"{UP}.qzeros has the shape (4, 31) and dtype int32, "
     "expected the shape (4, 32) for zero points of 4 bits"),
    ("gptq-4", replaced("qweight", torch.ones(16, 256)), f"{UP}.qweight has the shape (16, 256) and dtype float32"),
    ("gptq-4", replaced("qweight", torch.ones(15, 256, **INT32)), f"{WEIGHT} has 120 columns in groups of 32"),
    ("gptq-3", replaced("qweight", torch.ones(13, 256, **INT32)), f"{UP}.qweight has the shape (13, 256) and dtype "
     "int32, expected whole words of 3-bit numbers"),
    ("gptq-4", replaced("g_idx", torch.arange(127, **INT32)), f"{UP}.g_idx has the shape (127,) and dtype int32, "
     "expected the shape (128,) for 128 columns"),
    ("gptq-4", order(lambda g: g[:1].fill_(4)), f"{UP}.g_idx names the group 4, expected each of the groups 0 to 3"),
    ("gptq-4", order(lambda g: g[:1].fill_(-1)), f"{UP}.g_idx names the group -1"),
    ("gptq-4", order(lambda g: g[:1].fill_(3)), f"{UP}.g_idx names 31 columns in group 0, expected each of the groups "
     "0 to 3 for 32 columns"),
    ("gptq-4", cell("scales", float("nan")), f"{UP}.scales has a scale in row 3 that is NaN or infinite"),
    ("awq", cell("scales", float("inf")), f"{UP}.scales has a scale in row 3 that is NaN or infinite"),
    ("awq", without("scales"), f"lacks the tensor {UP}.scales"),
    ("awq", replaced("qzeros", torch.ones(4, 31, **INT32)), f"{UP}.qzeros has the shape (4, 31)"),
    ("awq", replaced("qweight", torch.ones(120, 32, **INT32)), f"{WEIGHT} has 120 columns in groups of 32"),
    ("compressed-4", without("weight_scale"), f"lacks the tensor {UP}.weight_scale"),
    ("compressed-4", without("weight_shape"), f"lacks the tensor {UP}.weight_shape"),
    ("compressed-4", replaced("weight_shape", torch.tensor([256, 120])), f"{UP}.weight_packed has 256 rows of 16 "
     f"words, but {UP}.weight_shape says 256 x 120 and config_groups 4 bits"),
    ("compressed-4", replaced("weight_shape", torch.tensor([255, 128])), f"{UP}.weight_shape says 255 x 128"),
    ("compressed-4", replaced("weight_scale", torch.ones(256, 3)), f"{UP}.weight_scale has the shape (256, 3) and "
     "dtype float32, expected the shape (256, 4) for 256 rows of 4 groups"),
    ("compressed-4", cell("weight_scale", float("nan"), (3, 0)), f"{UP}.weight_scale has a scale in row 3"),
    ("compressed-4-asymmetric", without("weight_zero_point"), f"lacks the tensor {UP}.weight_zero_point"),
    ("compressed-4-asymmetric", replaced("weight_zero_point", torch.ones(31, 4, **INT32)),
     f"{UP}.weight_zero_point has the shape (31, 4)"),
    ("compressed-4-act-order", cell("weight_g_idx", 9, (0,)), f"{UP}.weight_g_idx names the group 9"),
    ("compressed-int8-asymmetric", replaced("weight_zero_point", torch.ones(256, 1)),
     f"{UP}.weight_zero_point has the shape (256, 1) and dtype float32, expected int8 in the shape (256, 1)"),
    ("nvfp4", replaced("weight_scale", torch.ones(256, 7).to(torch.float8_e4m3fn)),
     f"{UP}.weight_scale has the shape (256, 7)"),
    ("nvfp4", replaced("weight_global_scale", torch.zeros(1)), f"{UP}.weight_scale has a scale in row 0"),
    ("mxfp4", cell("weight_scale", 255, (3, 1)), f"{UP}.weight_scale has a scale in row 3"),
    ("fp8", cell("weight", float("nan"), (3, 0)), f"{WEIGHT} holds a NaN or an infinite number in row 3"),
    ("fp8-blocks", cell("weight_scale_inv", float("inf"), (1, 0)), f"{UP}.weight_scale_inv has a scale in row 32"),
    ("fp8", without("weight_scale_inv"), f"{WEIGHT} holds 8-bit floats and has 0 scales"),
    ("bitsandbytes-int8", cell("SCB", float("nan"), (3,)), f"{UP}.SCB has a scale in row 3"),
    ("bitsandbytes-int8", replaced("SCB", torch.ones(255)), f"{UP}.SCB has the shape (255,)"),
    ("bitsandbytes-int8", replaced("weight_format", torch.tensor(2, dtype=torch.uint8)),
     f"{UP}.weight_format names the layout 2, expected rows (0)"),
    ("nf4", without("weight.absmax"), f"lacks the tensor {WEIGHT}.absmax"),
    ("nf4", replaced("weight.absmax", torch.ones(511)), f"{WEIGHT}.absmax has the shape (511,)"),
    ("nf4", cell("weight.absmax", float("nan"), (7,)), f"{WEIGHT} holds a NaN or an infinite number in row 3"),
    ("nf4", replaced("weight.quant_map", torch.ones(15)), f"{WEIGHT}.quant_map has the shape (15,)"),
    ("nf4", replaced("weight", torch.ones(100, 1, dtype=torch.uint8)), f"{WEIGHT} has the shape (100, 1)"),
    ("nf4", replaced("weight.quant_state.bitsandbytes__nf4", torch.ones(9, dtype=torch.uint8)),
     f"{WEIGHT}.quant_state.bitsandbytes__nf4 is not valid JSON"),
    ("nf4", replaced("weight.quant_state.bitsandbytes__nf4", torch.tensor([123, 125], dtype=torch.uint8)),
     f"{WEIGHT}.quant_state.bitsandbytes__nf4 is malformed"),
    ("nf4-nested", without("weight.nested_absmax"), f"lacks the tensor {WEIGHT}.nested_absmax"),
    ("mlx-4", without("scales"), f"lacks the tensor {UP}.scales"),
    ("mlx-4", cell("biases", float("nan"), (3, 0)), f"{UP}.scales has an offset in row 3"),
    ("mlx-4", replaced("biases", torch.ones(256, 3)), f"{UP}.biases has the shape (256, 3)"),
]  # fmt: skip


@pytest.mark.parametrize(("form", "change", "message"), TENSORS, ids=[f"{f}: {m[-60:]}" for f, _, m in TENSORS])
def test_tensors(written, tmp_path, form, change, message):
    folder = Path(shutil.copytree(written(form), tmp_path / "x"))
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert message in refused(folder)


# The form, what is changed in its settings, and what the error says.
SETTINGS = [
    ("gptq-4", {"group_size": 48}, "mlp.down_proj.weight has 256 columns in groups of 48, expected a size that"),
    ("gptq-4", {"group_size": 0}, "columns in groups of 0"),
    ("gptq-4", {"group_size": -2}, "quantization of gptq is malformed"),
    ("gptq-4", {"bits": 5}, "has a GPTQ checkpoint of 5 bits, expected one of (2, 3, 4, 8)"),
    ("gptq-4", {"checkpoint_format": "marlin"}, "of the format 'marlin', expected one of gptq, gptq_v2"),
    ("gptq-4", {"is_marlin_format": True}, "of the format 'marlin'"),
    ("gptq-4", {"dynamic": {"+:.*down.*": {"bits": 8}}}, "modules that match '+:.*down.*'"),
    ("gptq-4", {"quant_method": "quark"}, "has the quant_method 'quark', expected one of gptq, awq,"),
    ("gptq-4", {"quant_method": "bitsandbytes"}, "quantized by GPTQ or AWQ, as the tensor model.layers.0.mlp"),
    ("awq", {"group_size": 48}, "columns in groups of 48"),
    ("awq", {"version": "gemv"}, "has an AWQ checkpoint of the version 'gemv', expected 'gemm'"),
    ("awq", {"version": "GEMV_fast"}, "of the version 'gemv_fast'"),
    ("awq", {"version": None, "backend": "llm-awq"}, "of the version 'llm-awq'"),
    ("awq", {"bits": 8}, "has an AWQ checkpoint of 8 bits, expected 4"),
    ("compressed-4", {"format": "marlin-24"}, "of the format 'marlin-24', expected one of pack-quantized"),
    ("compressed-4", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "of the format 'sparse-24-bitmask'"),
    ("compressed-4", {"transform_config": {"config_groups": {"R3": {}}}}, "with a transform_config"),
    ("compressed-4", {"config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 48}}}},
     "columns in groups of 48"),
    ("compressed-4", {"config_groups": {"group_0": {"weights": {"num_bits": 3, "group_size": 32}}}},
     "config_groups 3 bits, expected a matrix of 2 or 4 or 8 bits"),
    ("mlx-4", {"bits": 4, "group_size": 64, "mode": "mxfp4"}, "in the mode 'mxfp4' with 4 bits, expected the mode"),
    ("mlx-4", {"bits": 4, "group_size": 48}, "columns in groups of 48"),
]  # fmt: skip


@pytest.mark.parametrize(("form", "change", "message"), SETTINGS, ids=[f"{f}: {m[-60:]}" for f, _, m in SETTINGS])
def test_settings(written, tmp_path, form, change, message):
    folder = Path(shutil.copytree(written(form), tmp_path / "x"))
    config = json.loads((folder / "config.json").read_text())
    key = FORMS[form].key
    (folder / "config.json").write_text(json.dumps(config | {key: config[key] | change}))
    assert message in refused(folder)


def refused(folder: Path) -> str:
    """The error of opening a checkpoint and reading its matrices, both ways."""
    with pytest.raises(UserError) as caught:
        read_all(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def read_all(folder: Path) -> None:
    ours = open_checkpoint(folder, "auto", {})
    tensor = ours.source.tensors[WEIGHT]
    if tensor.encoded is not None:
        tensor.encoded.read(slice(0, tensor.shape[0]))
    ours.tensor("layers.0.feed_forward.w13.weight")
