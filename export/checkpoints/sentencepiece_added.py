"""Writes the tokens that a fine-tune added to a SentencePiece model into the model, where a box finds them.

transformers keeps them in files of its own beside `tokenizer.model`: in `added_tokens_decoder` of
tokenizer_config.json, which counts alone if it is there, else in added_tokens.json, which has no flags. A special
token becomes a control piece, which no text can forge; any other becomes a user-defined piece, found in every text.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
from sentencepiece import sentencepiece_model_pb2

from export.checkpoints.json_files import convert, read_json
from runtime.artifact.manifest import TextAfterAdded
from runtime.errors import UserError, refusing

CONFIG, SPECIALS, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
MOST_ADDED = 2**16  # ids beyond those of the model
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5  # types of pieces
REPLACEABLE = (CONTROL, USER_DEFINED, UNUSED)  # pieces that stand for no text until a fine-tune gives them a meaning
NAMED_PIECES = ("unk_piece", "bos_piece", "eos_piece", "pad_piece")  # by which a model knows its special tokens
# The keys of special tokens in the order in which transformers gives ids to those that have none.
SPECIAL_KEYS = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
    "additional_special_tokens", "extra_special_tokens",
)  # fmt: skip


class _Token(msgspec.Struct, frozen=True):
    content: str
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


class _Config(msgspec.Struct, frozen=True):
    added_tokens_decoder: dict[str, _Token] | None = None
    legacy: bool | None = None


@dataclass(frozen=True)
class WithAdded:
    """A SentencePiece model with its added tokens, and what a text is behind one of them."""

    data: bytes
    text_after_added: TextAfterAdded


def with_added_tokens(data: bytes, path: Path) -> WithAdded:
    """The model in `data`, whose file is `path`, with the tokens that the files beside it add.

    Raises `UserError` if a file is malformed, or gives a token an id or a flag that the model cannot have.
    """
    values = {name: _values(path.parent / name) for name in (CONFIG, SPECIALS)}
    config = convert(values[CONFIG], _Config, path.parent / CONFIG)
    specials = list(dict.fromkeys(name for found in values.values() for name in _special_names(found)))
    where, tokens = _tokens(config, specials, path.parent)
    with refusing(f"{path} is not a SentencePiece model", "fetch the checkpoint again"):
        proto = sentencepiece_model_pb2.ModelProto.FromString(data)
        before = sentencepiece_model_pb2.ModelProto.FromString(data)
    _Additions(proto, where, path).add(tokens)
    known = {piece.piece for piece in proto.pieces}
    for name in specials:
        if name not in known:
            proto.pieces.add(piece=name, score=0.0, type=CONTROL)
    if proto == before:
        return WithAdded(data, "joined")
    return WithAdded(bytes(proto.SerializeToString()), "bare" if config.legacy is False else "spaced")


def _values(path: Path) -> Mapping[str, object]:
    return read_json(path) if path.is_file() else {}


def _special_names(values: Mapping[str, object]) -> Iterator[str]:
    """The names of special tokens; each is a text or has its text as `content`, alone or in a list or an object."""
    for key in SPECIAL_KEYS:
        yield from _names(values.get(key))


def _names(value: object) -> Iterator[str]:
    if isinstance(value, str) and value:
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _names(item)
    elif isinstance(value, dict):
        yield from _names(value["content"] if "content" in value else list(value.values()))


def _tokens(config: _Config, specials: Sequence[str], folder: Path) -> tuple[Path, dict[int, _Token]]:
    """The added tokens by id, and the file that lists them."""
    if config.added_tokens_decoder is not None:
        where = folder / CONFIG
        listed = [(token_id, token) for token_id, token in config.added_tokens_decoder.items()]
    else:
        where = folder / ADDED
        ids = convert(_values(where), dict[str, int], where)
        listed = [(str(token_id), _Token(name, special=name in specials)) for name, token_id in ids.items()]
    odd = next((token_id for token_id, _ in listed if not (token_id.isascii() and token_id.isdigit())), None)
    if odd is not None:
        raise UserError(f"{where} has an added token with the id {odd!r}, expected a whole number from 0")
    tokens = {int(token_id): token for token_id, token in sorted(listed, key=lambda pair: int(pair[0]))}
    if len(tokens) < len(listed) or len({token.content for token in tokens.values()}) < len(tokens):
        raise UserError(f"{where} lists an added token or an id twice; keep one of the two")
    return where, tokens


@dataclass(frozen=True)
class _Additions:
    """Puts tokens into a model; `where` lists them, and `path` is the model's file."""

    proto: sentencepiece_model_pb2.ModelProto
    where: Path
    path: Path

    def add(self, tokens: Mapping[int, _Token]) -> None:
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

    def _check(self, token_id: int, token: _Token, own: Mapping[str, int], limit: int) -> None:
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

    def _mark(self, token_id: int, token: _Token) -> None:
        """Give a piece of the model the name and the type of the token that takes its place."""
        piece = self.proto.pieces[token_id]
        for name in NAMED_PIECES:
            if getattr(self.proto.trainer_spec, name) == piece.piece:
                setattr(self.proto.trainer_spec, name, token.content)
        piece.piece = token.content
        if piece.type == NORMAL or (piece.type in REPLACEABLE and token.special):
            piece.type = _type(token)


def _type(token: _Token) -> int:
    return CONTROL if token.special else USER_DEFINED
