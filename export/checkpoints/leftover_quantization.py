"""A `quantization_config` that stayed in config.json after the weights were written as plain numbers."""

from collections.abc import Mapping

from export.checkpoints.source import TensorSource

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
