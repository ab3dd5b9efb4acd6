"""Opens a SentencePiece model once for the ids that a tokenizer needs, and refuses other files with one sentence."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from runtime.errors import refusing


@dataclass(frozen=True)
class SentencePieceIds:
    """The ids that begin and end a text; None if the model has no such token. `special_tokens` are as in a manifest."""

    bos_id: int | None
    eos_id: int | None
    special_tokens: Mapping[str, str]


def load_sentencepiece(data: bytes, path: Path) -> SentencePieceProcessor:
    """The model in `data` as the library reads it; raises `UserError` if it is not a SentencePiece model."""
    processor = SentencePieceProcessor()
    with refusing(f"{path} is not a SentencePiece model", "fetch the checkpoint again"):
        processor.LoadFromSerializedProto(data)
    return processor


def open_sentencepiece(data: bytes, path: Path) -> SentencePieceIds:
    """Read the model in `data`, whose file is `path`; raises `UserError` if it is not a SentencePiece model."""
    processor = load_sentencepiece(data, path)
    found = {"bos_token": processor.bos_id(), "eos_token": processor.eos_id(), "unk_token": processor.unk_id()}
    ids = {key: token_id for key, token_id in found.items() if token_id >= 0}  # negative: there is none
    names = {key: str(processor.id_to_piece(token_id)) for key, token_id in ids.items()}
    return SentencePieceIds(ids.get("bos_token"), ids.get("eos_token"), names)
