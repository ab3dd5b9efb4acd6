"""Checkpoints with quantized matrices, written as the software of each format writes them.

`write_quantized(source, folder, FORMS[name])` rounds the matrices of a checkpoint's layers, packs them in that form,
and says what floats they mean.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.helpers.quantized_matrices import (
    Array,
    Packed,
    Tensors,
    awq,
    bitsandbytes_4bit,
    bitsandbytes_int8,
    compressed,
    compressed_int8,
    float4,
    float8,
    gptq,
    mlx,
)

LAYERS = (".self_attn.", ".mlp.", ".block_sparse_moe.experts.", ".attention.", ".feed_forward.")
KINDS = {  # the file with weights -> the file with settings, and the key there if it is always the same
    "model.safetensors": ("config.json", None),
    "consolidated.safetensors": ("params.json", "quantization"),
}


@dataclass(frozen=True)
class Form:
    """One way of storing: the settings in config.json, and what packs a module's matrix (N, K)."""

    settings: Mapping[str, Any]
    pack: Callable[[str, Array], Packed]
    key: str = "quantization_config"


def write_quantized(source: Path, folder: Path, form: Form) -> dict[str, Array]:
    """Write a Hugging Face folder, or one in Mistral's own format, with the matrices of its layers quantized.

    Returns the floats that each of them means, by its plain name.
    """
    shutil.copytree(source, folder)
    file = next(name for name in KINDS if (source / name).is_file())
    tensors: Tensors = {}
    exact: dict[str, Array] = {}
    for name, tensor in load_file(source / file).items():
        if tensor.ndim == 2 and any(part in name for part in LAYERS) and not name.endswith("gate.weight"):
            module = name.removesuffix(".weight")
            packed, exact[name] = form.pack(module, tensor.float().numpy())
            tensors |= {f"{module}.{ending}": value.contiguous() for ending, value in packed.items()}
        else:
            tensors[name] = tensor
    save_file(tensors, folder / file, {"format": "pt"})
    settings, key = KINDS[file]
    config = json.loads((folder / settings).read_text())
    (folder / settings).write_text(json.dumps(config | {key or form.key: dict(form.settings)}))
    return exact


def _gptq(**options: Any) -> Form:
    said = {
        "quant_method": "gptq", "bits": options.get("bits", 4), "group_size": options.get("size", 32),
        "desc_act": options.get("act_order", False), "sym": options.get("symmetric", True),
        "checkpoint_format": "gptq_v2" if options.get("version") == 2 else "gptq",
    }  # fmt: skip
    return Form(said, partial(gptq, **options))


def _awq(**options: Any) -> Form:
    said = {"quant_method": "awq", "bits": 4, "group_size": options.get("size", 32), "version": "gemm"}
    return Form(said | {"zero_point": True, "modules_to_not_convert": None}, partial(awq, **options))


def _compressed(pack: Callable[..., Packed], layout: str, weights: Mapping[str, Any], **options: Any) -> Form:
    group = {"targets": ["Linear"], "weights": {"type": "int", "symmetric": True, **weights}}
    said = {"quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": group}}
    return Form(said | {"ignore": ["lm_head"]}, partial(pack, **options))


def _group(bits: int, size: int | None, *, symmetric: bool = True) -> dict[str, Any]:
    return {
        "num_bits": bits, "symmetric": symmetric, "group_size": size, "strategy": "group" if size else "channel",
    }  # fmt: skip


FLOAT8 = {"num_bits": 8, "type": "float"}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
MLX_KEY = "quantization"
FORMS: Mapping[str, Form] = {
    "gptq-4": _gptq(),
    "gptq-4-bf16": _gptq(dtype=torch.bfloat16),
    "gptq-4-asymmetric": _gptq(symmetric=False),
    "gptq-4-v2": _gptq(symmetric=False, version=2),
    "gptq-4-rows": _gptq(size=-1),
    "gptq-4-act-order": _gptq(act_order=True),
    "gptq-4-act-order-asymmetric": _gptq(act_order=True, symmetric=False),
    "gptq-8": _gptq(bits=8),
    "gptq-8-asymmetric": _gptq(bits=8, symmetric=False),
    "gptq-8-rows": _gptq(bits=8, size=-1),
    "gptq-2": _gptq(bits=2),
    "gptq-3": _gptq(bits=3, symmetric=False),
    "awq": _awq(),
    "awq-rows": _awq(size=-1),
    "compressed-4": _compressed(compressed, "pack-quantized", _group(4, 32)),
    "compressed-4-asymmetric": _compressed(
        compressed, "pack-quantized", _group(4, 32, symmetric=False), symmetric=False, dtype=torch.float16
    ),
    "compressed-4-rows": _compressed(compressed, "pack-quantized", _group(4, None), size=-1),
    "compressed-4-act-order": _compressed(compressed, "pack-quantized", _group(4, 32), act_order=True),
    "compressed-8": _compressed(compressed, "pack-quantized", _group(8, 32), bits=8),
    "compressed-8-rows": _compressed(compressed, "pack-quantized", _group(8, None), bits=8, size=-1),
    "compressed-int8": _compressed(compressed_int8, "int-quantized", _group(8, None)),
    "compressed-int8-asymmetric": _compressed(
        compressed_int8, "int-quantized", _group(8, None, symmetric=False), symmetric=False
    ),
    "compressed-float8-rows": _compressed(
        float8, "float-quantized", FLOAT8, block=(1, 2**30), ending="weight_scale", dtype=torch.bfloat16
    ),
    "compressed-float8": _compressed(
        float8, "naive-quantized", FLOAT8, block=None, ending="weight_scale", activations=True
    ),
    "compressed-float8-blocks": _compressed(
        float8, "float-quantized", FLOAT8 | {"block_structure": [48, 32]}, block=(48, 32), ending="weight_scale"
    ),
    "nvfp4": _compressed(float4, "nvfp4-pack-quantized", {"num_bits": 4, "type": "float", "group_size": 16}),
    "mxfp4": _compressed(float4, "mxfp4-pack-quantized", {"num_bits": 4, "type": "float", "group_size": 32}, size=32),
    "fp8": Form(FP8, partial(float8, block=None, dtype=torch.bfloat16)),
    "fp8-rows": Form({"quant_method": "fbgemm_fp8"}, partial(float8, block=(1, 2**30), ending="weight_scale")),
    "fp8-blocks": Form(FP8 | {"weight_block_size": [32, 32]}, float8),
    "fp8-cut-blocks": Form(FP8 | {"weight_block_size": [48, 48]}, partial(float8, block=(48, 48))),
    "bitsandbytes-int8": Form({"quant_method": "bitsandbytes", "load_in_8bit": True}, bitsandbytes_int8),
    "nf4": Form({"quant_method": "bitsandbytes", "load_in_4bit": True}, bitsandbytes_4bit),
    "nf4-nested": Form(
        {"quant_method": "bitsandbytes", "load_in_4bit": True}, partial(bitsandbytes_4bit, nested=True, dtype="float16")
    ),
    "fp4": Form({"quant_method": "bitsandbytes", "load_in_4bit": True}, partial(bitsandbytes_4bit, kind="fp4")),
    "mlx-4": Form({"bits": 4, "group_size": 64}, mlx, MLX_KEY),
    "mlx-3": Form({"bits": 3, "group_size": 64}, partial(mlx, bits=3), MLX_KEY),
    "mlx-6": Form({"bits": 6, "group_size": 64}, partial(mlx, bits=6), MLX_KEY),
    "mlx-8": Form({"bits": 8, "group_size": 64}, partial(mlx, bits=8), MLX_KEY),
}
