"""Writes the tokens that a fine-tune added beside a SentencePiece model into the model, where a box finds them.

A special token becomes a control piece, which no text can forge; any other becomes a user-defined piece, which is
found in every text.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sentencepiece import sentencepiece_model_pb2

from export.checkpoints.tokenizers.added_tokens import MOST_ADDED, AddedToken, AddedTokens
from runtime.artifact.manifest import TextAfterAdded
from runtime.errors import UserError, refusing

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # types of pieces
REPLACEABLE = (CONTROL, USER_DEFINED, UNUSED)  # pieces that stand for no text until a fine-tune gives them a meaning
NAMED_PIECES = ("unk_piece", "bos_piece", "eos_piece", "pad_piece")  # by which a model knows its special tokens


@dataclass(frozen=True)
class WithAdded:
    """A SentencePiece model with its added tokens, and what a text is behind one of them."""

    data: bytes
    text_after_added: TextAfterAdded


def with_added_tokens(data: bytes, path: Path, added: AddedTokens) -> WithAdded:
    """The model in `data`, whose file is `path`, with the added tokens of its folder.

    Raises `UserError` if one has an id or a flag that the model cannot have.
    """
    with refusing(f"{path} is not a SentencePiece model", "fetch the checkpoint again"):
        proto = sentencepiece_model_pb2.ModelProto.FromString(data)
        before = sentencepiece_model_pb2.ModelProto.FromString(data)
    _Additions(proto, added.where, path).add(added.by_id)
    if proto == before:
        return WithAdded(data, "joined")
    return WithAdded(bytes(proto.SerializeToString()), "spaced" if added.legacy else "bare")


@dataclass(frozen=True)
class _Additions:
    """Puts tokens into a model; `where` lists them, and `path` is the model's file."""

    proto: sentencepiece_model_pb2.ModelProto
    where: Path
    path: Path

    def add(self, tokens: Mapping[int, AddedToken]) -> None:
        """Add the tokens in the order of their ids; ids in between get pieces that stand for nothing."""
        own = {piece.piece: i for i, piece in enumerate(self.proto.pieces)}
        limit = len(own) + MOST_ADDED
        for token_id, token in tokens.items():
            self._check(token_id, token, own, limit)
            if token_id < len(self.proto.pieces):
                self._mark(token_id, token)
                continue
            while len(self.proto.pieces) < token_id:
                self.proto.pieces.add(piece=f"<unused_{len(self.proto.pieces)}>", score=0.0, type=UNUSED)
            self.proto.pieces.add(piece=token.content, score=0.0, type=_type(token))

    def _check(self, token_id: int, token: AddedToken, own: Mapping[str, int], limit: int) -> None:
        name = f"{self.where} has the added token {token.content!r}"
        if not token.content or token_id >= limit:
            raise UserError(f"{name} with the id {token_id}, expected a text and an id below {limit}")
        flag = next((flag for flag in ("lstrip", "rstrip", "single_word") if getattr(token, flag)), None)
        if flag is not None:
            raise UserError(
                f"{name} with {flag}, which {self.path.name} cannot express; set it to false, or save the tokenizer "
                "with transformers, which writes tokenizer.json"
            )
        if own.get(token.content, token_id) != token_id:
            raise UserError(f"{name} with the id {token_id}, but {self.path} has it as {own[token.content]}")
        piece = self.proto.pieces[token_id] if token_id < len(own) else None
        if piece is not None and piece.piece != token.content and piece.type not in REPLACEABLE:
            raise UserError(f"{name} with the id {token_id}, which is {piece.piece!r} in {self.path}")

    def _mark(self, token_id: int, token: AddedToken) -> None:
        """Give a piece of the model the name and the type of the token that takes its place."""
        piece = self.proto.pieces[token_id]
        for name in NAMED_PIECES:
            if getattr(self.proto.trainer_spec, name) == piece.piece:
                setattr(self.proto.trainer_spec, name, token.content)
        piece.piece = token.content
        if piece.type == NORMAL or (piece.type in REPLACEABLE and token.special):
            piece.type = _type(token)


def _type(token: AddedToken) -> int:
    return CONTROL if token.special else USER_DEFINED
