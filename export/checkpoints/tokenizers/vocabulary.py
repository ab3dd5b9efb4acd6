"""The names of a tokenizer's tokens, whatever its library: what other files of a checkpoint refer to."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from export.checkpoints.source import TokenizerKind
from export.checkpoints.tokenizers.sentencepiece_model import load_sentencepiece
from export.checkpoints.tokenizers.tokenizer_json import open_tokenizer_json
from runtime.artifact.manifest import VOCABULARY_LIMIT


@dataclass(frozen=True)
class Vocabulary:
    """`id_of` and `name_of` return None for what the tokenizer does not have."""

    id_of: Callable[[str], int | None]
    name_of: Callable[[int], str | None]


def vocabulary_of(kind: TokenizerKind, data: bytes, path: Path) -> Vocabulary:
    """The vocabulary of a tokenizer's file; `path` names it in the `UserError` that is raised if it is malformed."""
    return _OPENERS[kind](data, path)


def tokenizer_vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    """The vocabulary of an opened tokenizer.json."""

    def name_of(token_id: int) -> str | None:
        return tokenizer.id_to_token(token_id) if 0 <= token_id < VOCABULARY_LIMIT else None  # it takes 32 bits

    return Vocabulary(tokenizer.token_to_id, name_of)


def _of_tokenizer_json(data: bytes, path: Path) -> Vocabulary:
    return tokenizer_vocabulary(open_tokenizer_json(data, path))


def _of_sentencepiece(data: bytes, path: Path) -> Vocabulary:
    processor = load_sentencepiece(data, path)
    size = processor.vocab_size()

    def id_of(name: str) -> int | None:
        token_id = int(processor.piece_to_id(name))  # the unknown piece's for any name that there is not
        return token_id if name_of(token_id) == name else None

    def name_of(token_id: int) -> str | None:
        return str(processor.id_to_piece(token_id)) if 0 <= token_id < size else None

    return Vocabulary(id_of, name_of)


_OPENERS: Mapping[TokenizerKind, Callable[[bytes, Path], Vocabulary]] = {
    "tokenizer.json": _of_tokenizer_json,
    "sentencepiece": _of_sentencepiece,
}
