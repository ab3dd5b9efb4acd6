"""Reads the tokenizer of a Hugging Face folder: which of its files counts, and how prompts begin and end."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import msgspec
from tokenizers import Tokenizer

from export.checkpoints.json_files import T, convert, read_json, read_text
from export.checkpoints.mistral_tokenizer import declared_tokenizer
from export.checkpoints.sentencepiece_model import open_sentencepiece
from export.checkpoints.source import TokenizerSource
from export.checkpoints.tokenizer_json import open_tokenizer_json

CHAT_TEMPLATE = "chat_template.jinja"


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


def open_tokenizer(folder: Path, config: Mapping[str, object]) -> TokenizerSource | None:
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
