"""Rebuilds the tokenizer in a GGUF header as the file that it came from: tokenizer.json or a SentencePiece model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import msgspec
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from export.checkpoints.source import TokenizerSource
from runtime.errors import UserError, refusing

PREFIX = "tokenizer.ggml."
T = TypeVar("T")

# GGUF's token types are those of SentencePiece.
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4
TOKEN_TYPES = range(1, 7)

# How each value of `tokenizer.ggml.pre` splits text before merging.
PRE_TOKENIZERS: Mapping[str, Callable[[], Any]] = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    ),
}


class _Header(msgspec.Struct, frozen=True):
    """The tokenizer's keys, without their prefix."""

    model: str
    tokens: tuple[str, ...]
    token_type: tuple[int, ...]
    pre: str | None = None
    merges: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    eot_token_id: int | None = None  # ends a turn in a chat
    add_bos_token: bool | None = None
    add_space_prefix: bool = True
    chat_template: str | None = None


@dataclass(frozen=True)
class _Kind:
    """One value of `tokenizer.ggml.model`: the file to rebuild, its builder, and the default of `add_bos_token`."""

    kind: Literal["tokenizer.json", "sentencepiece"]
    build: Callable[[_Header, str], bytes]
    add_bos: bool


def recover(metadata: Mapping[str, object], where: str) -> TokenizerSource | None:
    """The tokenizer of a GGUF header, or None if it has none; raises `UserError` for an unknown kind of tokenizer."""
    if f"{PREFIX}model" not in metadata:
        return None
    keys = {key.removeprefix(PREFIX): value for key, value in metadata.items() if key.startswith(PREFIX)}
    header = _header(keys | {"chat_template": metadata.get("tokenizer.chat_template")}, where)
    kind = _look_up(KINDS, header.model, "model", where)
    if len(header.token_type) != len(header.tokens) or len(set(header.tokens)) != len(header.tokens):
        raise UserError(
            f"{where} has {len(header.tokens)} tokens, some of them duplicates or without a type; "
            "convert the model again"
        )
    odd = next((kind for kind in header.token_type if kind not in TOKEN_TYPES), None)
    if odd is not None:
        raise UserError(f"{where} has a token of the unknown type {odd}, expected 1 to 6; convert the model again")
    ends = dict.fromkeys(token for token in (header.eos_token_id, header.eot_token_id) if token is not None)
    add_bos = kind.add_bos if header.add_bos_token is None else header.add_bos_token
    return TokenizerSource(
        kind.kind, kind.build(header, where), header.chat_template, header.bos_token_id, tuple(ends), add_bos
    )


def _byte_level(header: _Header, where: str) -> bytes:
    """tokenizer.json of a byte-level BPE."""
    pre_tokenizer = _look_up(PRE_TOKENIZERS, header.pre, "pre", where)()
    vocab = {token: i for i, token in enumerate(header.tokens)}
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in header.merges)]
    with refusing(f"{where} has merges that do not fit its tokens", "convert the model again"):
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    typed = list(zip(header.tokens, header.token_type, strict=True))
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token, kind in typed if kind == CONTROL]
    )
    tokenizer.add_tokens(
        [AddedToken(token, special=False, normalized=False) for token, kind in typed if kind == USER_DEFINED]
    )
    return str(tokenizer.to_str()).encode()


def _sentencepiece(header: _Header, where: str) -> bytes:
    """The serialized ModelProto of a SentencePiece BPE, with the settings that llama.cpp assumes for this kind."""
    if len(header.scores) != len(header.tokens):
        raise UserError(
            f"{where} has {len(header.tokens)} tokens and {len(header.scores)} scores, "
            "expected one score for each token; convert the model again"
        )
    proto = sentencepiece_model_pb2.ModelProto()
    for token, score, kind in zip(header.tokens, header.scores, header.token_type, strict=True):
        proto.pieces.add(piece=token, score=score, type=kind)
    unknown = [i for i, kind in enumerate(header.token_type) if kind == UNKNOWN]
    if len(unknown) != 1:
        raise UserError(f"{where} has {len(unknown)} tokens of the type unknown, expected one; convert the model again")
    trainer = proto.trainer_spec
    trainer.model_type = sentencepiece_model_pb2.TrainerSpec.BPE
    trainer.vocab_size = len(header.tokens)
    trainer.byte_fallback = True
    trainer.unk_id, trainer.unk_piece = unknown[0], header.tokens[unknown[0]]
    trainer.pad_id = -1
    trainer.bos_id, trainer.bos_piece = _piece(header, header.bos_token_id, "<s>", where)
    trainer.eos_id, trainer.eos_piece = _piece(header, header.eos_token_id, "</s>", where)
    normalizer = proto.normalizer_spec
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = header.add_space_prefix
    normalizer.remove_extra_whitespaces = False
    return bytes(proto.SerializeToString())


def _piece(header: _Header, token_id: int | None, absent: str, where: str) -> tuple[int, str]:
    """The id and text of a special token; SentencePiece writes -1 for one that does not exist."""
    if token_id is None:
        return -1, absent
    if not 0 <= token_id < len(header.tokens):
        raise UserError(
            f"{where} names the special token {token_id}, expected an id below {len(header.tokens)}; "
            "convert the model again"
        )
    return token_id, header.tokens[token_id]


def _look_up(table: Mapping[str, T], key: str | None, name: str, where: str) -> T:
    if key is None or key not in table:
        raise UserError(
            f"{where} has {PREFIX}{name}: {key!r}, which is not supported; expected one of {', '.join(table)}"
        )
    return table[key]


def _header(keys: Mapping[str, object], where: str) -> _Header:
    try:
        return msgspec.convert(keys, _Header)
    except msgspec.ValidationError as error:
        raise UserError(f"{where} has a malformed tokenizer: {error}; convert the model again") from error


KINDS: Mapping[str, _Kind] = {
    "gpt2": _Kind("tokenizer.json", _byte_level, add_bos=False),
    "llama": _Kind("sentencepiece", _sentencepiece, add_bos=True),
}
