"""Reads Hugging Face folders: config.json; their tensors and tokenizers have modules of their own."""

from collections.abc import Mapping
from pathlib import Path

import msgspec

from export.checkpoints import families
from export.checkpoints.huggingface_tensors import open_tensors
from export.checkpoints.huggingface_tokenizer import open_tokenizer
from export.checkpoints.json_files import convert, read_json
from export.checkpoints.mistral_format import overruled
from export.checkpoints.source import Opened
from runtime.errors import UserError


class _Rope(msgspec.Struct, frozen=True):
    """`rope_parameters` of transformers 5, or `rope_scaling` in older files."""

    rope_type: str | None = None
    type: str | None = None  # the older spelling of rope_type
    rope_theta: float | None = None
    partial_rotary_factor: float | None = None


class _RopeKeys(msgspec.Struct, frozen=True):
    """The keys of config.json that describe rotary embedding."""

    rope_scaling: _Rope | None = None
    rope_parameters: _Rope | None = None


def open_folder(folder: Path) -> Opened:
    """Read a folder's headers and small files.

    Raises `UserError` for anything that is missing or malformed, and for an unknown architecture.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json, expected a Hugging Face checkpoint folder")
    where = str(folder / "config.json")
    config = read_json(folder / "config.json")
    family = families.find("huggingface", config.get("model_type"), where)
    config = config | _rope_values(config, where)
    changes, notes = (
        overruled(folder, config, family.defaults.get("sliding_window"))
        if "sliding_window" in family.keys
        else ({}, ())
    )
    source = open_tensors(folder)
    return Opened(family, config | changes, where, source, open_tokenizer(folder, config), notes)


def _rope_values(config: Mapping[str, object], where: str) -> dict[str, object]:
    """The rotary parameters as top-level keys of config.json, with the precedence that transformers gives them."""
    keys = convert(config, _RopeKeys, where)
    rope = keys.rope_scaling or keys.rope_parameters or _Rope()
    given = {"rope_theta": rope.rope_theta, "partial_rotary_factor": rope.partial_rotary_factor}
    return {"rope_type": rope.rope_type or rope.type or "default"} | {
        key: value for key, value in given.items() if value is not None
    }
