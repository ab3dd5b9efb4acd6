"""Quantized weights that are not read, which are refused, and a `quantization_config` that stayed behind."""

from collections.abc import Mapping

from export.checkpoints.huggingface.quantization_settings import KEY
from export.checkpoints.quantized.methods import METHOD, READERS, is_read
from export.checkpoints.source import TensorSource
from runtime.errors import UserError

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
    ".q_weight": "ExLlamaV2",
    ".trellis": "ExLlamaV3",
    ".W_q": "HQQ",
}
DESCRIBED = {  # of software whose weights are read as the settings describe them
    ".qweight": "GPTQ or AWQ",
    ".absmax": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".weight_packed": "compressed-tensors",
    ".biases": "MLX",
}
INSTEAD = "set frontend.checkpoint to the model before that, or to a GGUF file of it"


def check_not_quantized(source: TensorSource, settings: Mapping[str, object] | None, where: str) -> None:
    """Raise `UserError` for quantized weights that were not read.

    `settings` is what the checkpoint says of its quantization. The weights are in a form that only the software reads
    that has quantized them, or the settings do not describe them.
    """
    for name in source.tensors:
        software = _made_by(name, SOFTWARE)
        if software is not None:
            raise UserError(
                f"{where}: the weights are quantized by {software}, as the tensor {name} tells, and are not read so; "
                f"{INSTEAD}"
            )
    said = settings or {}
    method = said.get(METHOD)
    if method is not None and not is_read(said) and _is_quantized(source):
        raise UserError(
            f"{where} has the {METHOD} {method!r}, expected one of {', '.join(READERS)}, whose weights are read; "
            f"{INSTEAD}"
        )
    for name in source.tensors:
        software = _made_by(name, DESCRIBED)
        if software is not None:
            raise UserError(
                f"{where}: the weights are quantized by {software}, as the tensor {name} tells, but "
                f"{f'the {METHOD} is {method!r}' if method else f'no {KEY} says how'}; fetch the checkpoint with its "
                "configuration again"
            )


def _made_by(name: str, endings: Mapping[str, str]) -> str | None:
    return next((software for ending, software in endings.items() if name.endswith(ending)), None)


def _is_quantized(source: TensorSource) -> bool:
    return any(
        tensor.packing is None and (tensor.dtype not in PLAIN or name.endswith(QUANTIZED_NAMES))
        for name, tensor in source.tensors.items()
    )


def without_leftover_quantization(
    config: Mapping[str, object], source: TensorSource, where: str
) -> tuple[dict[str, object], tuple[str, ...]]:
    """The keys of config.json, without `quantization_config` if no tensor is quantized, and a note if one was left out.

    A model that was dequantized, or trained further and saved, often keeps the key.
    """
    given = config.get(KEY)
    if given is None or _is_quantized(source):
        return dict(config), ()
    method = given.get("quant_method") if isinstance(given, Mapping) else None
    return {key: value for key, value in config.items() if key != KEY}, (
        f"{where} has a {KEY}{f' of {method}' if method else ''}, but every tensor is stored as plain numbers; "
        "they are read as they are",
    )
