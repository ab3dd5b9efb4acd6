"""The special tokens that the small files of a Hugging Face folder name."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import msgspec

from export.checkpoints.json_files import convert, read_optional_json
from runtime.artifact.manifest import MOST_SPECIAL_TOKENS, TokenName

CONFIG_FILE = "tokenizer_config.json"
MAP_FILE = "special_tokens_map.json"
STANDARD = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
SUFFIX = "_token"  # of the key of a model's own special token, such as image_token
MORE = "extra_special_tokens"  # may be an object of such keys; a list of tokens gives them no names


class _Token(msgspec.Struct, frozen=True):
    content: TokenName


class _Named(msgspec.Struct, frozen=True):
    tokens: Annotated[dict[str, TokenName | _Token | None], msgspec.Meta(max_length=MOST_SPECIAL_TOKENS)]


def named_tokens(folder: Path) -> Mapping[str, str | None]:
    """Special tokens by their keys, as transformers hands them to a chat template; None for one that there is not.

    As in transformers, special_tokens_map.json overrules a tokenizer_config.json without `added_tokens_decoder`, and
    otherwise does not count. Raises `UserError` if a file is malformed.
    """
    config = read_optional_json(folder / CONFIG_FILE)
    overruling = {} if "added_tokens_decoder" in config else read_optional_json(folder / MAP_FILE)
    return _named(config, folder / CONFIG_FILE) | _named(overruling, folder / MAP_FILE)


def _named(values: Mapping[str, object], path: Path) -> dict[str, str | None]:
    """The tokens that one file names. Not every value of a key with the suffix is one: `add_bos_token` is true."""
    more = values.get(MORE)
    own = {**values, **more} if isinstance(more, dict) else values
    given = {key: own[key] for key in STANDARD if key in own} | {
        key: value
        for key, value in own.items()
        if isinstance(value, str | dict) and (key.endswith(SUFFIX) or (isinstance(more, dict) and key in more))
    }
    tokens = convert({"tokens": given}, _Named, path).tokens
    return {key: token.content if isinstance(token, _Token) else token for key, token in tokens.items()}
