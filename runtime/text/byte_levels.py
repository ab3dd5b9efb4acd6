"""The bytes that an entry of a vocabulary stands for, in the two notations that vocabularies have for bytes."""

import re

BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
SPACE_PIECE = "\N{LOWER ONE EIGHTH BLOCK}"


def _printable(byte: int) -> bool:
    return 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255


# GPT-2's alphabet (Radford et al., 2019, encoder.py): a byte that is a visible character of Latin-1 is that character,
# and the others are the characters from U+0100 on, in order.
_OTHERS = [byte for byte in range(256) if not _printable(byte)]
BYTE_OF = {chr(byte): byte for byte in range(256) if _printable(byte)} | {
    chr(256 + place): byte for place, byte in enumerate(_OTHERS)
}


def bytes_of_letters(entry: str) -> bytes | None:
    """The bytes of an entry of which each character is a byte; None if a character is none."""
    found = [BYTE_OF.get(character) for character in entry]
    known = [byte for byte in found if byte is not None]
    return bytes(known) if len(known) == len(found) else None


def bytes_of_piece(entry: str) -> bytes:
    """The bytes of an entry that is text with U+2581 for spaces, or `<0x0A>` for a single byte."""
    byte = BYTE_PIECE.fullmatch(entry)
    return bytes([int(byte[1], 16)]) if byte else entry.replace(SPACE_PIECE, " ").encode()
