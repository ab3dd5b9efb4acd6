"""Rebuilds the tokenizer in a GGUF header as the file that it came from: tokenizer.json or a SentencePiece model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from sentencepiece import sentencepiece_model_pb2

from export.checkpoints.gguf.byte_level import build_byte_level
from export.checkpoints.gguf.ends import end_ids
from export.checkpoints.gguf.vocabulary import AGAIN, BYTE, CONTROL, PREFIX, UNKNOWN, Vocabulary, read_vocabulary
from export.checkpoints.source import TokenizerSource
from runtime.artifact.manifest import TextAfterAdded
from runtime.errors import UserError

UNKNOWN_NAME = "<unk>"
BYTE_NAMES = frozenset(f"<0x{byte:02X}>" for byte in range(256))


@dataclass(frozen=True)
class _Kind:
    """One value of `tokenizer.ggml.model`: the file to rebuild, and what llama.cpp takes for granted with it."""

    kind: Literal["tokenizer.json", "sentencepiece"]
    build: Callable[[Vocabulary, str], tuple[bytes, bool]]  # the file, and `add_bos` if the header leaves it out
    ids: Mapping[str, int]  # of special tokens that the header leaves out
    text_after_added: TextAfterAdded = "joined"


def recover(metadata: Mapping[str, object], where: str, rows: int | None = None) -> TokenizerSource | None:
    """The tokenizer of a GGUF header, or None if it has none.

    `rows` is the number of embeddings, if it is known. Raises `UserError` for an unknown kind of tokenizer, and for one
    that is malformed.
    """
    model = metadata.get(f"{PREFIX}model")
    if model is None:
        return None
    if not isinstance(model, str) or model not in KINDS:
        raise UserError(
            f"{where} has {PREFIX}model: {model!r}, which is not supported; expected one of {', '.join(KINDS)}"
        )
    kind = KINDS[model]
    vocabulary = read_vocabulary(metadata, rows, kind.ids, where)
    data, usual = kind.build(vocabulary, where)
    add_bos = usual if vocabulary.add_bos_token is None else vocabulary.add_bos_token
    if add_bos and vocabulary.bos_token_id is None:
        raise UserError(
            f"{where} puts a token before every text, but lacks {PREFIX}bos_token_id, which says which one; {AGAIN}"
        )
    return TokenizerSource(
        kind.kind,
        data,
        vocabulary.chat_template,
        vocabulary.bos_token_id,
        end_ids(vocabulary.tokens, vocabulary.ends),
        add_bos,
        end_id=vocabulary.eos_token_id if vocabulary.add_eos_token else None,
        special_tokens=_special_tokens(vocabulary),
        text_after_added=kind.text_after_added,
    )


def _special_tokens(vocabulary: Vocabulary) -> dict[str, str]:
    """The variables of a chat template that stand for special tokens."""
    ids = {
        "bos_token": vocabulary.bos_token_id,
        "eos_token": vocabulary.eos_token_id,
        "unk_token": vocabulary.unknown_token_id,
        "pad_token": vocabulary.padding_token_id,
    }
    return {name: vocabulary.tokens[token_id] for name, token_id in ids.items() if token_id is not None}


def _sentencepiece(vocabulary: Vocabulary, where: str) -> tuple[bytes, bool]:
    """The serialized ModelProto of a SentencePiece BPE, with the settings that llama.cpp assumes for this kind."""
    if len(vocabulary.scores) < len(vocabulary.tokens):
        raise UserError(
            f"{where} has {len(vocabulary.tokens)} tokens and {len(vocabulary.scores)} scores, "
            f"expected one score for each token; {AGAIN}"
        )
    unknown = _unknown_id(vocabulary, where)
    has_bytes = _has_bytes(vocabulary, where)
    proto = sentencepiece_model_pb2.ModelProto()
    for i, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.token_type, strict=True)):
        # The library wants one unknown piece; no text is made of any other that has this type.
        used = UNKNOWN if i == unknown else BYTE if token in BYTE_NAMES else CONTROL if kind == UNKNOWN else kind
        proto.pieces.add(piece=token, score=vocabulary.scores[i], type=used)
    trainer = proto.trainer_spec
    trainer.model_type = sentencepiece_model_pb2.TrainerSpec.BPE
    trainer.vocab_size = len(vocabulary.tokens)
    trainer.byte_fallback = has_bytes
    trainer.unk_id, trainer.unk_piece = unknown, vocabulary.tokens[unknown]
    trainer.pad_id = -1
    trainer.bos_id, trainer.bos_piece = _piece(vocabulary, vocabulary.bos_token_id, "<s>")
    trainer.eos_id, trainer.eos_piece = _piece(vocabulary, vocabulary.eos_token_id, "</s>")
    normalizer = proto.normalizer_spec
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = vocabulary.add_space_prefix
    normalizer.remove_extra_whitespaces = False
    return bytes(proto.SerializeToString()), True


def _has_bytes(vocabulary: Vocabulary, where: str) -> bool:
    """Whether the vocabulary has a token for each byte, which llama.cpp knows by their names, or for none."""
    typed = [token for token, kind in zip(vocabulary.tokens, vocabulary.token_type, strict=True) if kind == BYTE]
    held = BYTE_NAMES.intersection(vocabulary.tokens)
    if len(held) not in (0, len(BYTE_NAMES)) or not held.issuperset(typed):
        odd = next((token for token in typed if token not in held), None)
        found = f"{len(held)} of the {len(BYTE_NAMES)} tokens of bytes" if odd is None else f"a byte's token {odd!r}"
        raise UserError(f"{where} has {found}, expected all from <0x00> to <0xFF>, or none; {AGAIN}")
    return bool(held)


def _unknown_id(vocabulary: Vocabulary, where: str) -> int:
    """The id of the unknown token: the only one of this type, else the one that the header names, else by its name.

    Some headers name the end of a text as the unknown token, which it cannot be in a SentencePiece model.
    """
    typed = [i for i, kind in enumerate(vocabulary.token_type) if kind == UNKNOWN]
    named, ends = vocabulary.unknown_token_id, (vocabulary.bos_token_id, vocabulary.eos_token_id)
    if len(typed) == 1:
        return typed[0]
    if named is not None and named not in ends:
        return named
    if UNKNOWN_NAME in vocabulary.tokens:
        return vocabulary.tokens.index(UNKNOWN_NAME)
    if typed:
        return typed[0]
    raise UserError(
        f"{where} has no unknown token, expected {PREFIX}unknown_token_id, a token of the type {UNKNOWN}, "
        f"or one of the name {UNKNOWN_NAME}; {AGAIN}"
    )


def _piece(vocabulary: Vocabulary, token_id: int | None, absent: str) -> tuple[int, str]:
    """The id and text of a special token; SentencePiece writes -1 for one that does not exist."""
    return (-1, absent) if token_id is None else (token_id, vocabulary.tokens[token_id])


KINDS: Mapping[str, _Kind] = {
    "gpt2": _Kind("tokenizer.json", build_byte_level, {}),
    "llama": _Kind("sentencepiece", _sentencepiece, {"bos_token_id": 1, "eos_token_id": 2}, "spaced"),
}
