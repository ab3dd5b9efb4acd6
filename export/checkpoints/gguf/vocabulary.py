"""The tokenizer's keys in a GGUF header, with its tokens made complete: a type and a name of its own for each."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from export.checkpoints.gguf.ends import end_names
from export.checkpoints.tokenizers.chat_templates import DEFAULT, WITH_TOOLS, one_template
from runtime.errors import UserError

PREFIX = "tokenizer.ggml."
TEMPLATES = {DEFAULT: "tokenizer.chat_template", WITH_TOOLS: f"tokenizer.chat_template.{WITH_TOOLS}"}
AGAIN = "convert the model again"
# GGUF's token types are those of SentencePiece.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = TOKEN_TYPES = range(1, 7)
WITHOUT_TEXT = (UNKNOWN, CONTROL, UNUSED)  # types of tokens that no text is made of
BYTE_NAME = re.compile(r"<0x[0-9A-Fa-f]{2}>")
ENDS = ("eos_token_id", "eot_token_id", "eom_token_id", "fim_pad_token_id", "fim_rep_token_id", "fim_sep_token_id")
# Ids that a model runs without: llama.cpp ignores one of these that no token has.
OPTIONAL = ("unknown_token_id", "padding_token_id", "fim_pad_token_id", "fim_rep_token_id", "fim_sep_token_id")
SPECIAL = ("bos_token_id", *ENDS, "unknown_token_id", "padding_token_id")


class Vocabulary(msgspec.Struct, frozen=True):
    """The tokenizer's keys, without their prefix."""

    model: str
    tokens: tuple[str, ...]
    token_type: tuple[int, ...] = ()
    pre: str | None = None
    merges: tuple[str, ...] | None = None
    scores: tuple[float, ...] = ()
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    eot_token_id: int | None = None  # ends a turn in a chat
    eom_token_id: int | None = None  # ends a message that a tool answers
    unknown_token_id: int | None = None
    padding_token_id: int | None = None
    fim_pad_token_id: int | None = None
    fim_rep_token_id: int | None = None
    fim_sep_token_id: int | None = None
    add_bos_token: bool | None = None
    add_eos_token: bool = False
    add_space_prefix: bool = True
    chat_template: str | None = None

    @property
    def ends(self) -> list[int | None]:
        """The ids of the keys `ENDS`."""
        return [getattr(self, key) for key in ENDS]


def read_vocabulary(
    metadata: Mapping[str, object], rows: int | None, defaults: Mapping[str, int], where: str
) -> Vocabulary:
    """The vocabulary in a header, complete, for a model with this number of embeddings (None: any number).

    `defaults` are the ids that llama.cpp assumes of special tokens that the header leaves out. Raises `UserError` for
    what is malformed, for an id without a token, and for two tokens of the same text.
    """
    keys = {key.removeprefix(PREFIX): value for key, value in metadata.items() if key.startswith(PREFIX)}
    found = _convert(keys | {"chat_template": _template(metadata, where)}, where)
    size = len(found.tokens) if rows is None else min(rows, len(found.tokens))
    found = _with_defaults(found, defaults, size)
    _check_ids(found, size, where)
    types = _types(found, where)
    tokens = _distinct(found.tokens, types, where)
    ends = set(end_names(tokens))
    types = [CONTROL if token in ends else kind for token, kind in zip(tokens, types, strict=True)]
    if size < len(tokens):
        tokens, types = _cut(tokens, types, size, where)
    return msgspec.structs.replace(found, tokens=tuple(tokens), token_type=tuple(types))


def _template(metadata: Mapping[str, object], where: str) -> str | None:
    named: dict[str, str] = {}
    for name, key in TEMPLATES.items():
        template = metadata.get(key)
        if isinstance(template, str):
            named[name] = template
        elif template is not None:
            raise UserError(f"{where} has {key}: {template!r:.40}, expected a text; {AGAIN}")
    return one_template(named)


def _convert(keys: Mapping[str, object], where: str) -> Vocabulary:
    try:
        return msgspec.convert(keys, Vocabulary)
    except msgspec.ValidationError as error:
        raise UserError(f"{where} has a malformed tokenizer: {error}; {AGAIN}") from error


def _with_defaults(found: Vocabulary, defaults: Mapping[str, int], size: int) -> Vocabulary:
    """The vocabulary with the usual ids of special tokens, and without optional ids beyond its `size`."""
    changes: dict[str, Any] = {
        key: token_id for key, token_id in defaults.items() if getattr(found, key) is None and token_id < size
    }
    for key in OPTIONAL:
        token_id = getattr(found, key)
        if token_id is not None and not 0 <= token_id < size:
            changes[key] = None
    return msgspec.structs.replace(found, **changes)


def _check_ids(found: Vocabulary, size: int, where: str) -> None:
    for key in SPECIAL:
        token_id = getattr(found, key)
        if token_id is not None and not 0 <= token_id < size:
            raise UserError(
                f"{where} names the special token {token_id} as {PREFIX}{key}, expected an id below {size}; {AGAIN}"
            )


def _types(found: Vocabulary, where: str) -> list[int]:
    """The type of each token; where the header has none, they follow from the names and the special ids."""
    if not found.token_type:
        controls = {getattr(found, key) for key in SPECIAL}
        types = [
            BYTE if BYTE_NAME.fullmatch(token) else CONTROL if i in controls else NORMAL
            for i, token in enumerate(found.tokens)
        ]
        if found.unknown_token_id is not None:
            types[found.unknown_token_id] = UNKNOWN
        return types
    types = list(found.token_type[: len(found.tokens)])
    if len(types) < len(found.tokens):
        raise UserError(f"{where} has {len(found.tokens)} tokens and types for {len(types)} of them; {AGAIN}")
    odd = next((kind for kind in types if kind not in TOKEN_TYPES), None)
    if odd is not None:
        raise UserError(f"{where} has a token of the unknown type {odd}, expected 1 to 6; {AGAIN}")
    return types


def _distinct(tokens: Sequence[str], types: Sequence[int], where: str) -> list[str]:
    """The tokens, each under a name of its own, as both libraries need them.

    An empty one is renamed as llama.cpp renames it, and so is a repeated one of which no text is made.
    """
    first: dict[str, int] = {}
    result = []
    for i, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        name = f"[EMPTY_{i}]" if not token else f"[DUPLICATE_{i}]" if token in first and kind in WITHOUT_TEXT else token
        if name in first:
            raise UserError(f"{where} has the token {name!r} twice, with the ids {first[name]} and {i}; {AGAIN}")
        first[name] = i
        result.append(name)
    return result


def _cut(tokens: Sequence[str], types: Sequence[int], rows: int, where: str) -> tuple[list[str], list[int]]:
    """The tokens that have an embedding; those beyond may only be padding."""
    beyond = next((i for i in range(rows, len(tokens)) if types[i] != UNUSED), None)
    if beyond is not None:
        raise UserError(
            f"{where} has {len(tokens)} tokens for {rows} embeddings, and token {beyond} is {tokens[beyond]!r}, "
            f"expected none but unused tokens beyond the embeddings; {AGAIN}"
        )
    return list(tokens[:rows]), list(types[:rows])
