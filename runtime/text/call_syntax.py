"""The JSON of tool calls, read symbol by symbol as it comes.

A reader is a generator that is sent symbols: single characters, or the names of control tokens, which are longer. It
raises `MalformedError` for the first symbol that is out of place.
"""

import json
from collections.abc import Generator

Symbols = Generator[None, str, str]
CLOSING = {"{": "}", "[": "]"}


class MalformedError(ValueError):
    """A model has not kept to its format."""


def read_character() -> Symbols:
    """The next symbol, which has to be a character."""
    symbol = yield
    if len(symbol) > 1:
        raise MalformedError
    return symbol


def skip_space() -> Symbols:
    """The next symbol that is not whitespace."""
    while (symbol := (yield)).isspace():
        pass
    return symbol


def read_string() -> Symbols:
    """The text of a string, with its closing quotation mark; the opening one has been read."""
    characters = []
    escaped = False
    while True:
        character = yield from read_character()
        characters.append(character)
        if character == '"' and not escaped:
            return "".join(characters)
        escaped = character == "\\" and not escaped


def string_value(text: str) -> str:
    """The value of a string whose text `read_string` has read."""
    try:
        return str(json.loads(f'"{text}', strict=False))
    except ValueError as error:
        raise MalformedError from error


def read_container(opening: str) -> Symbols:
    """The text of an object or a list, whose first character has been read.

    Its brackets match; whether it is valid in other respects is not looked at.
    """
    characters = [opening]
    closing = [CLOSING[opening]]
    while closing:
        character = yield from read_character()
        characters.append(character)
        if character == '"':
            characters.append((yield from read_string()))
        elif character in CLOSING:
            closing.append(CLOSING[character])
        elif character in CLOSING.values() and character != closing.pop():
            raise MalformedError
    return "".join(characters)


def skip_value(first: str) -> Symbols:
    """Read any value that begins with `first`; returns the next symbol that is not whitespace."""
    if len(first) > 1:
        raise MalformedError
    if first in CLOSING:
        yield from read_container(first)
    elif first == '"':
        yield from read_string()
    else:  # a number or a word, which only the symbol behind it ends
        symbol = first
        while not symbol.isspace():
            if symbol in (",", "}", "]"):
                return symbol
            symbol = yield from read_character()
    return (yield from skip_space())
