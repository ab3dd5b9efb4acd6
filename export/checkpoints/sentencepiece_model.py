"""Opens a SentencePiece model once for the ids that a tokenizer needs, and refuses other files with one sentence."""

from dataclasses import dataclass
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from runtime.errors import refusing


@dataclass(frozen=True)
class SentencePieceIds:
    """The ids that begin and end a text; None if the model has no such token."""

    bos_id: int | None
    eos_id: int | None


def open_sentencepiece(data: bytes, path: Path) -> SentencePieceIds:
    """Read the model in `data`, whose file is `path`; raises `UserError` if it is not a SentencePiece model."""
    processor = SentencePieceProcessor()
    with refusing(f"{path} is not a SentencePiece model", "fetch the checkpoint again"):
        processor.LoadFromSerializedProto(data)
    bos, eos = processor.bos_id(), processor.eos_id()
    return SentencePieceIds(bos if bos >= 0 else None, eos if eos >= 0 else None)
