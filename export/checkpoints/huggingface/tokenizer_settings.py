"""What the small files of a Hugging Face folder say of its tokenizer, whichever file the tokenizer itself is in."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from export.checkpoints.json_files import T, convert, read_optional_json
from export.checkpoints.tokenizers.chat_templates import folder_template
from export.checkpoints.tokenizers.special_tokens import CONFIG_FILE, named_tokens

ABSENT = -1  # written in place of an id


class _SpecialIds(msgspec.Struct, frozen=True):
    """The part of config.json and of generation_config.json that gives the token ids that begin and end a text.

    Null and -1 stand for a token that there is not.
    """

    bos_token_id: int | None = None
    eos_token_id: int | tuple[int | None, ...] | None = None

    @property
    def begin_id(self) -> int | None:
        return None if self.bos_token_id == ABSENT else self.bos_token_id

    @property
    def end_ids(self) -> tuple[int, ...]:
        eos = self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)
        return tuple(token_id for token_id in eos if token_id is not None and token_id != ABSENT)


class _TokenizerConfig(msgspec.Struct, frozen=True):
    """The part of tokenizer_config.json that we use, its special tokens and templates apart."""

    add_bos_token: bool | None = None
    add_eos_token: bool | None = None


@dataclass(frozen=True)
class TokenizerSettings:
    """Settings of one folder; None where it says nothing."""

    folder: Path
    add_bos: bool | None
    add_eos: bool | None
    bos_id: int | None
    end_ids: tuple[int, ...]  # of generation_config.json, then of config.json
    named: Mapping[str, str | None]  # special tokens by their keys; None for one that there is not
    template: str | None
    own_template: bool  # whether the template is the folder's own, and not one that the user gives
    notes: tuple[str, ...] = ()  # for the user


def read_settings(folder: Path, config: Mapping[str, object], template: str | None) -> TokenizerSettings:
    """Read a folder whose config.json is `config`; `template` replaces its chat template.

    Raises `UserError` if a file is malformed.
    """
    options = _optional(folder / CONFIG_FILE, _TokenizerConfig)
    ids = convert(config, _SpecialIds, folder / "config.json")
    generation = _optional(folder / "generation_config.json", _SpecialIds)
    own, notes = folder_template(folder) if template is None else (None, ())
    return TokenizerSettings(
        folder,
        add_bos=options.add_bos_token,
        add_eos=options.add_eos_token,
        bos_id=ids.begin_id,
        end_ids=tuple(dict.fromkeys((*generation.end_ids, *ids.end_ids))),
        named=named_tokens(folder),
        template=own if template is None else template,
        own_template=template is None,
        notes=notes,
    )


def _optional(path: Path, kind: type[T]) -> T:
    return convert(read_optional_json(path), kind, path)
