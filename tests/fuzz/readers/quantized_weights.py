"""A quantized matrix of a Hugging Face folder: the settings in config.json, and the tensors that it is stored in.

An input describes both: each tensor by its dtype, its shape, and bytes that are repeated until it is full.
"""

import json
import struct
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Annotated, Any

import msgspec
import numpy as np

from export.checkpoints.encodings.encoding import decoded
from runtime.errors import UserError
from tests.fuzz.mutations import spoil_json
from tests.fuzz.reader import Reader, demand, place
from tests.fuzz.tiny_files import CONFIG, DIM, HIDDEN, HUGGINGFACE, opened, tensors, write_huggingface

MODULE = "model.layers.0.mlp.up_proj"
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U32": 4, "I8": 1, "U8": 1, "F8_E4M3": 1}
LIMIT = 2**20  # bytes of a tensor; what takes more is not written
ONE, SMALL = {"F16": "003c", "BF16": "803f", "F32": "0000803f"}, "0123456789abcdef3210"
HALVES = np.repeat(np.arange(2, dtype="<i4"), 16).tobytes().hex()  # the groups of 32 columns
SHUFFLED = np.tile(np.arange(2, dtype="<i4"), 16).tobytes().hex()
SHAPE = np.array([HIDDEN, DIM], "<i8").tobytes().hex()
STATE = json.dumps({"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [HIDDEN, DIM]}).encode()
INTEGERS = {"num_bits": 4, "type": "int", "group_size": 16, "symmetric": False}

Size = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
FORMS: dict[str, tuple[dict[str, Any], dict[str, list[Any]]]] = {
    "gptq": (
        {"quant_method": "gptq", "bits": 4, "group_size": 16, "checkpoint_format": "gptq", "desc_act": True},
        {
            "qweight": ["I32", [4, 64], SMALL], "qzeros": ["I32", [2, 8], SMALL],
            "scales": ["F16", [2, 64], ONE["F16"]], "g_idx": ["I32", [32], SHUFFLED],
        },
    ),
    "awq": (
        {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"},
        {
            "qweight": ["I32", [32, 8], SMALL], "qzeros": ["I32", [2, 8], SMALL],
            "scales": ["F16", [2, 64], ONE["F16"]],
        },
    ),
    "compressed": (
        {
            "quant_method": "compressed-tensors", "format": "pack-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": INTEGERS}},
        },
        {
            "weight_packed": ["I32", [64, 4], SMALL], "weight_scale": ["BF16", [64, 2], ONE["BF16"]],
            "weight_shape": ["I64", [2], SHAPE], "weight_zero_point": ["I32", [8, 2], SMALL],
            "weight_g_idx": ["I32", [32], HALVES],
        },
    ),
    "int8": (
        {
            "quant_method": "compressed-tensors", "format": "int-quantized",
            "config_groups": {"group_0": {"weights": {"num_bits": 8}}},
        },
        {"weight": ["I8", [64, 32], SMALL], "weight_scale": ["F32", [64, 1], ONE["F32"]]},
    ),
    "nvfp4": (
        {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
        {
            "weight_packed": ["U8", [64, 16], SMALL], "weight_scale": ["F8_E4M3", [64, 2], "38"],
            "weight_global_scale": ["F32", [1], ONE["F32"]],
        },
    ),
    "float8": (
        {"quant_method": "fp8", "weight_block_size": [32, 16]},
        {"weight": ["F8_E4M3", [64, 32], "3a"], "weight_scale_inv": ["F32", [2, 2], ONE["F32"]]},
    ),
    "bitsandbytes-int8": (
        {"quant_method": "bitsandbytes"},
        {
            "weight": ["I8", [64, 32], SMALL], "SCB": ["F32", [64], ONE["F32"]], "weight_format": ["U8", [], "00"],
        },
    ),
    "nf4": (
        {"quant_method": "bitsandbytes"},
        {
            "weight": ["U8", [1024, 1], SMALL], "weight.absmax": ["F32", [32], ONE["F32"]],
            "weight.quant_map": ["F32", [16], ONE["F32"]],
            "weight.quant_state.bitsandbytes__nf4": ["U8", [len(STATE)], STATE.hex()],
        },
    ),
    "mlx": (
        {"bits": 4, "group_size": 16},
        {
            "weight": ["U32", [64, 4], SMALL], "scales": ["F16", [64, 2], ONE["F16"]],
            "biases": ["F16", [64, 2], ONE["F16"]],
        },
    ),
}  # fmt: skip


class Description(msgspec.Struct, frozen=True):
    """One input."""

    key: str
    settings: Any
    tensors: dict[str, tuple[str, tuple[Size, ...], str]]


def open_reader(folder: Path) -> Reader:
    checkpoint = write_huggingface(folder / "checkpoint")
    plain = tensors(HUGGINGFACE)
    del plain[f"{MODULE}.weight"]
    known = {"a layout that is no number": written("bitsandbytes-int8", {"weight_format": ["U8", [0], ""]})}
    return Reader([written(name, {}) for name in FORMS], spoil, partial(check, checkpoint, plain), known)


def written(name: str, changes: dict[str, list[Any]]) -> bytes:
    """The input of a form, with some tensors changed."""
    said, stored = FORMS[name]
    key = "quantization" if name == "mlx" else "quantization_config"
    return json.dumps({"key": key, "settings": said, "tensors": stored | changes}).encode()


def spoil(draw: Random, data: bytes) -> bytes:
    """Change the settings, or one to three tensors."""
    held = json.loads(data)
    if draw.random() < 0.4:
        settings = spoil_json(draw, json.dumps(held["settings"]).encode())
        return json.dumps(held).encode().replace(json.dumps(held["settings"]).encode(), settings)
    for _ in range(draw.choice((1, 1, 2, 3))):
        stored = held["tensors"]
        name = draw.choice(list(stored))
        draw.choice(CHANGES)(draw, stored, name)
    return json.dumps(held).encode()


def _other_dtype(draw: Random, stored: dict[str, Any], name: str) -> None:
    stored[name][0] = draw.choice(list(SIZES))


def _other_shape(draw: Random, stored: dict[str, Any], name: str) -> None:
    shape = stored[name][1]
    if not shape or draw.random() < 0.2:
        shape.append(draw.choice((0, 1, 2)))
    elif draw.random() < 0.2:
        shape.pop()
    else:
        at = draw.randrange(len(shape))
        shape[at] = draw.choice((shape[at] + 1, shape[at] - 1, shape[at] * 2, shape[at] // 2, 0, 1, 2**31, 2**62))


def _other_bytes(draw: Random, stored: dict[str, Any], name: str) -> None:
    held = bytearray(bytes.fromhex(stored[name][2]))
    held[draw.randrange(len(held))] = draw.choice((0, 1, 127, 128, 255, draw.randrange(256)))
    stored[name][2] = draw.choice((held.hex(), held.hex(), "ff", "00", "007c", "7f"))


def _absent(draw: Random, stored: dict[str, Any], name: str) -> None:
    if len(stored) > 1:
        del stored[name]


def _under_another_name(draw: Random, stored: dict[str, Any], name: str) -> None:
    _, others = draw.choice(list(FORMS.values()))
    stored[draw.choice(list(others))] = stored[name]


CHANGES: Sequence[Callable[[Random, dict[str, Any], str], None]] = (
    _other_dtype, _other_shape, _other_shape, _other_bytes, _other_bytes, _absent, _under_another_name
)  # fmt: skip


def check(checkpoint: Path, plain: dict[str, np.ndarray], data: bytes) -> None:
    said = described(data)
    (checkpoint / "config.json").write_text(json.dumps(CONFIG | {said.key: said.settings}))
    place(checkpoint / "model.safetensors", safetensors(said, plain))
    ours = opened(checkpoint, "huggingface")
    name = f"{MODULE}.weight"
    tensor = ours.source.tensors[name]
    whole = ours.source.read(name, slice(0, HIDDEN))
    parts = [ours.source.read(name, rows) for rows in (slice(0, 9), slice(9, HIDDEN))]
    demand(whole.tobytes() == np.concatenate(parts).tobytes(), "some rows differ from those of the whole")
    if tensor.encoded is not None:
        found = decoded(tensor.encoded.read(slice(0, HIDDEN)), tensor.encoded.encoding)
        demand(np.array_equal(found, whole), "the encoding means other numbers")


def described(data: bytes) -> Description:
    """An input as data; what is none, or takes too many bytes, is not the reader's to refuse."""
    try:
        found = msgspec.json.decode(data, type=Description)
        json.dumps(found.settings, ensure_ascii=False).encode()
        filled = [filling(*tensor) for tensor in found.tensors.values()]
    except (msgspec.MsgspecError, ValueError, RecursionError, KeyError, OverflowError) as error:
        raise UserError("this is no description of a checkpoint") from error
    if any(part is None for part in filled):
        raise UserError("a tensor is too large to write")
    return found


def filling(dtype: str, shape: tuple[int, ...], pattern: str) -> bytes | None:
    """The bytes of a tensor, or None if they are too many."""
    nbytes = SIZES[dtype]
    for size in shape:
        nbytes *= size
    repeated = np.frombuffer(bytes.fromhex(pattern) or b"\0", np.uint8)
    return np.resize(repeated, nbytes).tobytes() if nbytes <= LIMIT else None


def safetensors(said: Description, plain: dict[str, np.ndarray]) -> bytes:
    """The file, with the quantized matrix among plain tensors."""
    parts = [(name, "F32", array.shape, array.tobytes()) for name, array in plain.items()]
    for ending, (dtype, shape, pattern) in said.tensors.items():
        parts.append((f"{MODULE}.{ending}", dtype, shape, filling(dtype, shape, pattern) or b""))
    header, at = {}, 0
    for name, dtype, shape, held in parts:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + len(held)]}
        at += len(held)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"".join(held for *_, held in parts)
