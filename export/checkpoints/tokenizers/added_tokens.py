"""The tokens that a fine-tune added to its tokenizer, by the small files in which transformers keeps them.

They are `added_tokens_decoder` of tokenizer_config.json, which counts alone if it is there, or else added_tokens.json,
which has no flags: there, a token is special if it is named as one.
"""

import re
import reprlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from export.checkpoints.json_files import convert, read_optional_json
from export.checkpoints.tokenizers.special_tokens import CONFIG_FILE, MAP_FILE
from runtime.errors import UserError

ADDED_FILE = "added_tokens.json"
MOST_ADDED = 2**16  # tokens, and ids beyond those of the tokenizer
ID = re.compile("[0-9]{1,9}")


class AddedToken(msgspec.Struct, frozen=True):
    """A token and where it is found: `lstrip` and `rstrip` take the spaces beside it, `single_word` no part of a word.

    `normalized`, if it is given, says that it is looked for after a text has been normalized.
    """

    content: str
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool | None = None


class _Config(msgspec.Struct, frozen=True):
    added_tokens_decoder: dict[str, AddedToken] | None = None
    legacy: bool | None = None


class _Lists(msgspec.Struct, frozen=True):
    additional_special_tokens: list[str | AddedToken] | None = None
    extra_special_tokens: list[str | AddedToken] | dict[str, object] | None = None


@dataclass(frozen=True)
class AddedTokens:
    """The added tokens of a folder by id, in the order of their ids; `where` is the file that lists them.

    `legacy` is whether a text behind an added token begins with a space.
    """

    where: Path
    by_id: Mapping[int, AddedToken]
    legacy: bool


def read_added_tokens(folder: Path, named: Iterable[str | None]) -> AddedTokens:
    """Read the files of a folder; `named` are special tokens, as of `named_tokens`.

    Raises `UserError` if a file is malformed.
    """
    config = convert(read_optional_json(folder / CONFIG_FILE), _Config, folder / CONFIG_FILE)
    specials = {*named, *_listed(folder, config)}
    where, tokens = _tokens(config, specials, folder)
    return AddedTokens(where, tokens, legacy=config.legacy is not False)


def _listed(folder: Path, config: _Config) -> Iterator[str]:
    """Special tokens that have no keys of their own; the file of special tokens counts as in `named_tokens`."""
    for path in (folder / CONFIG_FILE, *((folder / MAP_FILE,) if config.added_tokens_decoder is None else ())):
        lists = convert(read_optional_json(path), _Lists, path)
        for more in (lists.additional_special_tokens, lists.extra_special_tokens):
            for token in more if isinstance(more, list) else ():
                yield token if isinstance(token, str) else token.content


def _tokens(config: _Config, specials: Collection[str | None], folder: Path) -> tuple[Path, dict[int, AddedToken]]:
    """The added tokens by id, and the file that lists them."""
    if config.added_tokens_decoder is not None:
        where = folder / CONFIG_FILE
        listed = [(token_id, token) for token_id, token in config.added_tokens_decoder.items()]
    else:
        where = folder / ADDED_FILE
        ids = convert(read_optional_json(where), dict[str, int], where)
        listed = [(str(token_id), AddedToken(name, special=name in specials)) for name, token_id in ids.items()]
    if len(listed) > MOST_ADDED:
        raise UserError(f"{where} lists {len(listed)} added tokens, expected at most {MOST_ADDED}")
    odd = next((token_id for token_id, _ in listed if not ID.fullmatch(token_id)), None)
    if odd is not None:
        raise UserError(
            f"{where} has an added token with the id {reprlib.repr(odd)}, expected a whole number from 0 below 10^9"
        )
    tokens = {int(token_id): token for token_id, token in sorted(listed, key=lambda pair: int(pair[0]))}
    if len(tokens) < len(listed) or len({token.content for token in tokens.values()}) < len(tokens):
        raise UserError(f"{where} lists an added token or an id twice; keep one of the two")
    return where, tokens
