"""Converts Mistral's tekken.json, a byte-level BPE given by ranks, to a `tokenizer.json`.

So the box needs no code for tekken. The two formats are equivalent: tekken merges any two neighbours that together form
a token, the lowest rank first; tokenizer.json lists the merges. A token's merge is the pair that is left after all
tokens of lower rank have been merged within it.
"""

import binascii
import json
from base64 import b64decode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import msgspec
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from runtime.artifact.manifest import VOCABULARY_LIMIT
from runtime.errors import UserError, refusing

BOS, EOS = "<s>", "</s>"
# The special tokens of files of version v7 and older that list none.
UNLISTED = (
    "<unk>", BOS, EOS, "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]",
    "[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]",
)  # fmt: skip
UNLISTED_VERSIONS = ("v3", "v7")
AGAIN = "fetch the checkpoint again"
TOKEN_LIMIT = 4096  # bytes of one token; finding its merge takes the square of that


class _Token(msgspec.Struct, frozen=True):
    rank: int
    token_bytes: str  # base64


class _Special(msgspec.Struct, frozen=True):
    rank: int
    token_str: str


class _Config(msgspec.Struct, frozen=True):
    pattern: str
    default_vocab_size: int
    default_num_special_tokens: int
    version: str


class _Choice(msgspec.Struct, frozen=True):
    values: tuple[str, ...]
    default: str | None = None


class _Settings(msgspec.Struct, frozen=True):
    """The settings that a chat may choose; the other kind, a schema for the reply, has no default."""

    reasoning_effort: _Choice | None = None


class _File(msgspec.Struct, frozen=True):
    config: _Config
    vocab: tuple[_Token, ...]
    special_tokens: tuple[_Special, ...] | None = None
    model_settings_builder: _Settings | None = None


@dataclass(frozen=True)
class Tekken:
    """A converted tekken.json: the bytes of a tokenizer.json, the declared version, and the special tokens by id.

    `settings` are the model's settings where a chat chooses none, as JSON.
    """

    data: bytes
    version: str
    specials: tuple[str, ...]
    settings: str | None = None

    @property
    def bos_id(self) -> int:
        """The id of the token that begins a text."""
        return self.specials.index(BOS)

    @property
    def eos_id(self) -> int:
        """The id of the token that ends a text."""
        return self.specials.index(EOS)


def convert(data: bytes, where: str) -> Tekken:
    """Convert a tekken.json, which `where` names in errors.

    Raises `UserError` if it is malformed or contains something that a tokenizer.json cannot express.
    """
    file = _read(data, where)
    specials = _specials(file, where)
    ranks = _ranks(file, where)
    pieces = _byte_characters()
    tokens = {_as_text(token, pieces): len(specials) + rank for token, rank in ranks.items()}
    if set(tokens) & set(specials):
        raise UserError(
            f"{where} has {sorted(set(tokens) & set(specials))[0]!r} both as a special token and as text; "
            "fetch the checkpoint again"
        )
    merges = [(_as_text(left, pieces), _as_text(right, pieces)) for left, right in _merges(ranks)]
    vocabulary = {name: i for i, name in enumerate(specials)} | tokens
    with refusing(f"{where} is not a vocabulary", AGAIN):
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    split = _split(file.config.pattern, specials, where)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in specials])
    return Tekken(
        str(tokenizer.to_str()).encode(), file.config.version, tuple(specials), _default_settings(file, where)
    )


def declared_version(data: bytes, where: str) -> str:
    """The version in a tekken.json's configuration; raises `UserError` if the file is malformed."""
    return _read(data, where).config.version


def _read(data: bytes, where: str) -> _File:
    try:
        return msgspec.json.decode(data, type=_File)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{where} is not a tekken tokenizer: {error}; fetch the checkpoint again") from error


def _default_settings(file: _File, where: str) -> str | None:
    """The settings of a file as Mistral's reference implementation writes them, or None if none has a default."""
    effort = file.model_settings_builder.reasoning_effort if file.model_settings_builder else None
    if effort is None:
        return None
    if effort.default not in effort.values:
        raise UserError(
            f"{where} has the default reasoning effort {effort.default!r}, expected one of {', '.join(effort.values)}; "
            f"{AGAIN}"
        )
    return json.dumps({"reasoning_effort": effort.default}, ensure_ascii=False)


def _specials(file: _File, where: str) -> list[str]:
    """The special tokens' names by id; unnamed ones are filled in as Mistral's reference implementation does."""
    listed, count = file.special_tokens, file.config.default_num_special_tokens
    if not 0 <= count <= file.config.default_vocab_size <= VOCABULARY_LIMIT:
        raise UserError(
            f"{where} declares {count} special tokens in a vocabulary of {file.config.default_vocab_size}, "
            f"expected at most {VOCABULARY_LIMIT} in all; {AGAIN}"
        )
    if listed is None and file.config.version not in UNLISTED_VERSIONS:
        raise UserError(
            f"{where} is of version {file.config.version} and lists no special tokens; fetch the checkpoint again"
        )
    names = list(UNLISTED) if listed is None else [token.token_str for token in listed]
    if listed is not None and [token.rank for token in listed] != list(range(len(listed))):
        raise UserError(
            f"{where} lists its special tokens out of order, expected ranks 0 to {len(listed) - 1}; "
            "fetch the checkpoint again"
        )
    names += [f"<SPECIAL_{i}>" for i in range(len(names), count)]
    if len(names) != count or len(set(names)) != len(names) or not {BOS, EOS} <= set(names):
        expected = f"{count} with different names, {BOS} and {EOS} among them"
        raise UserError(f"{where} has {len(names)} special tokens, expected {expected}; fetch the checkpoint again")
    return names


def _ranks(file: _File, where: str) -> dict[bytes, int]:
    """The ordinary tokens with their ranks, as many as the vocabulary has room for; the file may hold more."""
    size = file.config.default_vocab_size - file.config.default_num_special_tokens
    try:
        ranks = {b64decode(token.token_bytes, validate=True): token.rank for token in file.vocab[:size]}
    except (binascii.Error, ValueError) as error:
        raise UserError(f"{where} has a token that is not base64: {error}; fetch the checkpoint again") from error
    longest = max(map(len, ranks), default=0)
    if longest > TOKEN_LIMIT:
        raise UserError(f"{where} has a token of {longest} bytes, expected at most {TOKEN_LIMIT}; {AGAIN}")
    if list(ranks.values()) != list(range(size)) or any(bytes([byte]) not in ranks for byte in range(256)):
        raise UserError(
            f"{where} has a vocabulary that is not {size} different tokens in the order of their ranks; "
            "fetch the checkpoint again"
        )
    return ranks


def _merges(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pair that each token is merged from; a token that no merge reaches has none, and is found as a whole word."""
    parts = (_parts(token, rank, ranks) for token, rank in ranks.items() if len(token) > 1)
    return [(pair[0], pair[1]) for pair in parts if len(pair) == 2]


def _parts(token: bytes, limit: int, ranks: Mapping[bytes, int]) -> Sequence[bytes]:
    """The parts of a token that remain after every token of a rank below `limit` has been merged."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 1:
        rank, at = min((ranks.get(left + right, limit), i) for i, (left, right) in enumerate(pairwise(parts)))
        if rank >= limit:
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def _split(pattern: str, specials: Sequence[str], where: str) -> pre_tokenizers.PreTokenizer:
    """The pattern that splits a text into words.

    It splits every special token's name, too, so that no text is looked up as one.
    """
    with refusing(f"{where} has a pattern that does not compile", AGAIN):
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
    whole = [name for name in specials if len(split.pre_tokenize_str(name)) < 2]
    if whole:
        raise UserError(
            f"{where} has the special token {whole[0]!r}, which is one word of ordinary text; "
            "no tokenizer.json can tell the two apart"
        )
    return split


def _byte_characters() -> list[str]:
    """One printable character for each byte, as in GPT-2's vocabulary: itself, or the next one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    replaced = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(replaced)) for byte in range(256)]


def _as_text(token: bytes, pieces: Sequence[str]) -> str:
    return "".join(pieces[byte] for byte in token)
