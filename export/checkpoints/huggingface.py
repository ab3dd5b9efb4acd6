"""Reads Hugging Face folders: config.json, safetensors in one file or in shards, and the tokenizer's files."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath

import msgspec
from tokenizers import Tokenizer

from export.checkpoints import families
from export.checkpoints.json_files import T, convert, read_json, read_text
from export.checkpoints.mistral_format import overruled
from export.checkpoints.mistral_tokenizer import declared_tokenizer
from export.checkpoints.safetensors_source import SafetensorsSource
from export.checkpoints.sentencepiece_model import open_sentencepiece
from export.checkpoints.source import Opened, TokenizerSource
from export.checkpoints.tokenizer_json import open_tokenizer_json
from runtime.artifact.tensor_file import TensorFile
from runtime.errors import UserError

CHAT_TEMPLATE = "chat_template.jinja"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PATH_LIMIT = 1024  # characters; longer names are refused by file systems


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


class _SpecialIds(msgspec.Struct, frozen=True):
    """The part of config.json and of generation_config.json that gives the token ids that begin and end a text."""

    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None


class _Token(msgspec.Struct, frozen=True):
    content: str


class _Template(msgspec.Struct, frozen=True):
    name: str
    template: str


class _TokenizerConfig(msgspec.Struct, frozen=True):
    """The part of tokenizer_config.json that we use."""

    add_bos_token: bool | None = None
    add_eos_token: bool | None = None
    bos_token: str | _Token | None = None
    chat_template: str | tuple[_Template, ...] | None = None


class _Index(msgspec.Struct, frozen=True):
    weight_map: dict[str, str]


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
    source = _open_tensors(folder)
    return Opened(family, config | changes, where, source, _tokenizer(folder, config), notes)


def _rope_values(config: Mapping[str, object], where: str) -> dict[str, object]:
    """The rotary parameters as top-level keys of config.json, with the precedence that transformers gives them."""
    keys = convert(config, _RopeKeys, where)
    rope = keys.rope_scaling or keys.rope_parameters or _Rope()
    given = {"rope_theta": rope.rope_theta, "partial_rotary_factor": rope.partial_rotary_factor}
    return {"rope_type": rope.rope_type or rope.type or "default"} | {
        key: value for key, value in given.items() if value is not None
    }


def _open_tensors(folder: Path) -> SafetensorsSource:
    """Open model.safetensors, or else the shards that the index names: transformers looks for them in this order."""
    if (folder / SINGLE).is_file():
        file = TensorFile.open(folder / SINGLE)
        return SafetensorsSource.of(file)
    if (folder / INDEX).is_file():
        return _open_shards(folder)
    raise UserError(
        f"{folder} has neither {SINGLE} nor {INDEX}; save the checkpoint as safetensors, since no other format is read"
    )


def shards(folder: Path) -> dict[str, str]:
    """The shards that the folder's index names, by tensor; none if the folder has no index, or one file for all.

    Raises `UserError` for a malformed index, and for a shard that is outside the folder or missing.
    """
    index = folder / INDEX
    if (folder / SINGLE).is_file() or not index.is_file():
        return {}
    weight_map = convert(read_json(index), _Index, index).weight_map
    for shard in set(weight_map.values()):
        path = PurePosixPath(shard)
        if path.is_absolute() or ".." in path.parts or path.suffix != ".safetensors" or "\0" in shard:
            raise UserError(f"{index} names the shard {shard!r}, expected a .safetensors file inside the folder")
        if len(shard) > PATH_LIMIT or not (folder / shard).is_file():
            raise UserError(
                f"{index} names the shard {shard!r}, which {folder} does not have; fetch the checkpoint again"
            )
    return weight_map


def _open_shards(folder: Path) -> SafetensorsSource:
    index, weight_map = folder / INDEX, shards(folder)
    opened = {shard: TensorFile.open(folder / shard) for shard in sorted(set(weight_map.values()))}
    for name, shard in weight_map.items():
        if name not in opened[shard].tensors:
            raise UserError(
                f"{folder / shard} lacks the tensor {name}, which {index} lists there; fetch the checkpoint again"
            )
    for shard, file in opened.items():
        for name in file.tensors:
            if weight_map.get(name) != shard:
                raise UserError(
                    f"{file.path} holds the tensor {name}, which {index} does not list there; "
                    "fetch the checkpoint again"
                )
    return SafetensorsSource({name: opened[shard] for name, shard in weight_map.items()})


def _tokenizer(folder: Path, config: Mapping[str, object]) -> TokenizerSource | None:
    """The folder's tokenizer, or None.

    Mistral's own tokenizer comes first if a chat model declares its version, then tokenizer.json, then tokenizer.model.
    """
    options = _optional(folder / "tokenizer_config.json", _TokenizerConfig)
    template = _chat_template(folder, options)
    ids = convert(config, _SpecialIds, folder / "config.json")
    eos = _eos_ids(_optional(folder / "generation_config.json", _SpecialIds)) or _eos_ids(ids)
    own = None if template is None else declared_tokenizer(folder)
    if own is not None:  # the model was trained with it, and chat templates are known to differ from it
        return replace(own, eos_ids=eos or own.eos_ids)
    if (folder / "tokenizer.json").is_file():
        data = (folder / "tokenizer.json").read_bytes()
        tokenizer = open_tokenizer_json(data, folder / "tokenizer.json")
        bos, adds = _json_bos(tokenizer, options, ids.bos_token_id)
        add_bos = adds if options.add_bos_token is None else options.add_bos_token
        end_id = next((token_id for token_id in tokenizer.encode("").ids[int(adds) :] if token_id in eos), None)
        return TokenizerSource("tokenizer.json", data, template, bos, eos, add_bos, end_id)
    if (folder / "tokenizer.model").is_file():
        data = (folder / "tokenizer.model").read_bytes()
        bos = open_sentencepiece(data, folder / "tokenizer.model").bos_id
        add_bos = bos is not None and options.add_bos_token is not False
        return TokenizerSource(
            "sentencepiece", data, template, bos, eos, add_bos, eos[0] if eos and options.add_eos_token else None
        )
    return None


def _optional(path: Path, kind: type[T]) -> T:
    return convert(read_json(path) if path.is_file() else {}, kind, path)


def _eos_ids(ids: _SpecialIds) -> tuple[int, ...]:
    eos = ids.eos_token_id
    return () if eos is None else (eos,) if isinstance(eos, int) else eos


def _chat_template(folder: Path, options: _TokenizerConfig) -> str | None:
    """chat_template.jinja, which transformers prefers, or else `chat_template` of tokenizer_config.json.

    If that is a list of named templates, the one named "default".
    """
    if (folder / CHAT_TEMPLATE).is_file():
        return read_text(folder / CHAT_TEMPLATE)
    if isinstance(options.chat_template, tuple):
        return next((named.template for named in options.chat_template if named.name == "default"), None)
    return options.chat_template


def _json_bos(tokenizer: Tokenizer, options: _TokenizerConfig, configured: int | None) -> tuple[int | None, bool]:
    """The id that begins a prompt, and whether tokenizer.json itself adds it."""
    token = options.bos_token.content if isinstance(options.bos_token, _Token) else options.bos_token
    named = None if token is None else tokenizer.token_to_id(token)
    bos = configured if named is None else named
    return bos, bos is not None and tokenizer.encode("").ids[:1] == [bos]
