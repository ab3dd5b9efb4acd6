"""The table of quantization methods, by the names that checkpoints give them, and the reading of any of them."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Annotated

import msgspec

from export.checkpoints.json_files import convert
from export.checkpoints.quantized.awq import read_awq
from export.checkpoints.quantized.bitsandbytes_4bit import read_4bit
from export.checkpoints.quantized.bitsandbytes_int8 import read_int8
from export.checkpoints.quantized.compressed_tensors import block_structure, read_compressed
from export.checkpoints.quantized.float8 import Block, read_float8
from export.checkpoints.quantized.gptq import read_gptq
from export.checkpoints.quantized.matrix import Found, QuantizedMatrix, QuantizedTensors, notes_on
from export.checkpoints.quantized.mlx import read_mlx
from export.checkpoints.source import TensorSource

Settings = Mapping[str, object]
Reader = Callable[[TensorSource, Settings, str], Found]
METHOD = "quant_method"
# How the names of tensors end that say how activations and caches are rounded, which here they are not.
ACTIVATIONS = (
    ".activation_scale", ".input_scale", ".output_scale", ".qscale_act", ".k_scale", ".v_scale", ".kv_scale",
    ".q_scale", ".input_zero_point", ".output_zero_point", ".input_global_scale", ".input_scale_ub",
)  # fmt: skip


class _Blocks(msgspec.Struct, frozen=True):
    """The part of the settings that says which 8-bit floats have a scale in common."""

    weight_block_size: tuple[Annotated[int, msgspec.Meta(ge=1)], Annotated[int, msgspec.Meta(ge=1)]] | None = None


def _bitsandbytes(source: TensorSource, _settings: Settings, where: str) -> Found:
    eight, four = read_int8(source, where), read_4bit(source, where)
    return Found({**eight.matrices, **four.matrices}, eight.left_out)


def _only_float8(_source: TensorSource, _settings: Settings, _where: str) -> Found:
    return Found()


# By `quant_method`. 8-bit floats are read whatever the method is called, since their tensors say all.
READERS: Mapping[str, Reader] = {
    "gptq": read_gptq,
    "awq": read_awq,
    "compressed-tensors": read_compressed,
    "bitsandbytes": _bitsandbytes,
    "mlx": read_mlx,
    "fp8": _only_float8,
    "fbgemm_fp8": _only_float8,
}


def is_read(settings: Settings) -> bool:
    """Whether the weights of the method that settings name are read."""
    return str(settings.get(METHOD)) in READERS


def read_quantized(source: TensorSource, settings: Settings | None, where: str) -> tuple[TensorSource, tuple[str, ...]]:
    """The source with its quantized matrices under their plain names, and notes on them; itself if there are none.

    `settings` is what the checkpoint says of its quantization. Raises `UserError` for what does not fit together.
    """
    said = settings or {}
    found = READERS.get(str(said.get(METHOD)), _only_float8)(source, said, where)
    read = QuantizedTensors(source, found) if found.matrices else source
    floats = read_float8(read, where, _block(said, where))
    if not found.matrices and not floats.matrices:
        return source, ()
    matrices = {**found.matrices, **floats.matrices}
    activations = frozenset(name for name in source.tensors if name.endswith(ACTIVATIONS))
    biases = _zero_biases(source, matrices)
    merged = Found(matrices, found.left_out | activations | biases, found.notes)
    if activations:
        note = f"scales of activations and caches are left out ({len(activations)}): both stay as they are computed"
        merged = replace(merged, notes=(*merged.notes, note))
    return QuantizedTensors(source, merged), notes_on(merged)


def _block(settings: Settings, where: str) -> Block | None:
    if settings.get(METHOD) == "compressed-tensors":
        return block_structure(settings, where)
    return convert(settings, _Blocks, f"{where}, quantization").weight_block_size


def _zero_biases(source: TensorSource, matrices: Mapping[str, QuantizedMatrix]) -> frozenset[str]:
    """Biases of quantized matrices that are all 0, which GPTQ writes for layers that have none."""
    return frozenset(
        bias
        for bias in (name.removesuffix("weight") + "bias" for name in matrices)
        if bias in source.tensors
        and source.tensors[bias].shape == matrices[bias.removesuffix("bias") + "weight"].shape[:1]
        and not source.read(bias, slice(None)).any()
    )
