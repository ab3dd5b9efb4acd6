"""The pieces in the bytes of a SentencePiece model: which are user-defined, and the same model with some as controls.

A model is a protobuf message; its field 1 is repeated, a piece each: 1 its text, 2 its score, 3 its type. The format:
https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto. The box has no protobuf package.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

PIECES, TEXT, TYPE = 1, 1, 3  # numbers of fields
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types
CONTROL, USER_DEFINED = 3, 4  # types of pieces
# Field 3, the normalizer's settings: its field 3 (add_dummy_prefix) is false. A later setting counts.
NO_SPACE_IN_FRONT = b"\x1a\x02\x18\x00"


@dataclass(frozen=True)
class Piece:
    """One piece; `type_at` is where the byte of its type lies in the model, or None for an ordinary piece."""

    text: str
    type_at: int | None
    user_defined: bool


def pieces_of(model: bytes) -> Iterator[Piece]:
    """The pieces in the order of their ids; raises `ValueError` for a message that is cut short or malformed."""
    for number, begin, end in _fields(model, 0, len(model)):
        if number == PIECES:
            text, type_at = "", None
            for part, start, stop in _fields(model, begin, end):
                if part == TEXT:
                    text = model[start:stop].decode("utf-8", "replace")
                elif part == TYPE:
                    type_at = start
            yield Piece(text, type_at, type_at is not None and model[type_at] == USER_DEFINED)


def with_control_pieces(model: bytes, pieces: Sequence[Piece], names: frozenset[str]) -> bytes:
    """The model with those user-defined pieces as control tokens. Both types take one byte, so nothing moves."""
    changed = bytearray(model)
    for piece in pieces:
        if piece.user_defined and piece.type_at is not None and piece.text in names:
            changed[piece.type_at] = CONTROL
    return bytes(changed)


def without_space_in_front(model: bytes) -> bytes:
    """The model without the space that it puts in front of a text."""
    return model + NO_SPACE_IN_FRONT


def _fields(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """The number of each field of a message, and where its value begins and ends."""
    while at < end:
        tag, at = _varint(data, at, end)
        number, wire = tag >> 3, tag & 7
        if wire == VARINT:
            stop = _varint(data, at, end)[1]
        elif wire == BYTES:
            length, at = _varint(data, at, end)
            stop = at + length
        elif wire in (FIXED64, FIXED32):
            stop = at + (8 if wire == FIXED64 else 4)
        else:
            raise ValueError(f"it has a field of the unknown kind {wire}")
        if stop > end:
            raise ValueError("it is cut short")
        yield number, at, stop
        at = stop


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    """A number of seven bits a byte, lowest first, and where it ends."""
    value = shift = 0
    while at < end and shift < 70:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
    raise ValueError("it is cut short")
