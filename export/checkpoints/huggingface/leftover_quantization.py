"""Weights that other software has quantized, which are refused, and a `quantization_config` that stayed behind."""

from collections.abc import Mapping

from export.checkpoints.source import TensorSource
from runtime.errors import UserError

KEY = "quantization_config"
PLAIN = ("float32", "float16", "bfloat16", "float64")
# How the names of scales, zero points and packed numbers end in the formats that transformers writes.
QUANTIZED_NAMES = (
    "scale",
    "scale_inv",
    "scales",
    "zero_point",
    "qzeros",
    "g_idx",
    "absmax",
    "quant_map",
    "packed",
    "SCB",
)
# How a name ends that only one software gives -> that software.
SOFTWARE = {
    ".qweight": "GPTQ or AWQ",
    ".absmax": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".q_weight": "ExLlamaV2",
    ".trellis": "ExLlamaV3",
    ".weight_packed": "compressed-tensors",
    ".W_q": "HQQ",
    ".biases": "MLX",
}


def check_not_quantized(source: TensorSource, where: str) -> None:
    """Raise `UserError` for weights in a form that only the software reads that has quantized them."""
    for name in source.tensors:
        software = next((made_by for ending, made_by in SOFTWARE.items() if name.endswith(ending)), None)
        if software is not None:
            raise UserError(
                f"{where}: the weights are quantized by {software}, as the tensor {name} tells, and are not read so; "
                "set frontend.checkpoint to the model before that, or to a GGUF file of it"
            )


def without_leftover_quantization(
    config: Mapping[str, object], source: TensorSource, where: str
) -> tuple[dict[str, object], tuple[str, ...]]:
    """The keys of config.json, without `quantization_config` if no tensor is quantized, and a note if one was left out.

    A model that was dequantized, or trained further and saved, often keeps the key.
    """
    quantized = any(
        tensor.dtype not in PLAIN or name.endswith(QUANTIZED_NAMES) for name, tensor in source.tensors.items()
    )
    given = config.get(KEY)
    if given is None or quantized:
        return dict(config), ()
    method = given.get("quant_method") if isinstance(given, Mapping) else None
    return {key: value for key, value in config.items() if key != KEY}, (
        f"{where} has a {KEY}{f' of {method}' if method else ''}, but every tensor is stored as plain numbers; "
        "they are read as they are",
    )
