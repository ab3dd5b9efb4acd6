"""Text to token ids and back, with the tokenizer file that the artifact contains.

The library (`tokenizers` or `sentencepiece`) is imported only when a tokenizer is opened.
"""

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol

from runtime.artifact.manifest import TokenizerSpec
from runtime.errors import UserError
from runtime.text.instruct_formats import DIVIDERS
from runtime.text.json_library import JsonLibrary
from runtime.text.sentencepiece_library import SentencePieceLibrary
from runtime.text.stream import StreamDecoder, TextStream

TEXT_LIMIT = 2**23  # characters of one text; tokenizing more takes minutes and gigabytes


class TokenizerLibrary(Protocol):
    """The interface of a tokenizer library; it does not handle bos."""

    @property
    def control_tokens(self) -> Mapping[str, int]:
        """Ids of the control tokens by name."""

    @property
    def added_tokens(self) -> Mapping[str, int]:
        """Ids of the other tokens that the library finds in any text by their names."""

    @property
    def longest_token(self) -> int:
        """The most characters of a text that one token may stand for."""

    def with_controls(self, names: frozenset[str]) -> "TokenizerLibrary":
        """The same library with these of `added_tokens` as control tokens too."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text; control tokens' names in it are plain text."""

    def encode_rendered(self, text: str, stand_ins: Mapping[str, str]) -> list[int]:
        """Ids of a text; control tokens' names in it become those tokens.

        A character of `stand_ins` stands for the text that it maps to.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids from the start of a text; control tokens and ids without a token have no text."""

    def token_text(self, token_id: int) -> str | None:
        """The vocabulary's entry for an id; None outside the vocabulary."""

    def token_bytes(self, token_id: int) -> bytes | None:
        """The bytes that an id adds to a text; None for an id without text, such as a control token.

        Raises `UserError` for a tokenizer whose tokens do not stand for bytes one by one.
        """


class Tokenizer:
    """A tokenizer and its conventions: whether bos comes first, and which ids end a text.

    `dividers` are the names, by id, of the tokens that divide a reply into text, reasoning and tool calls. Some files
    have them as added tokens that are not special, so that other software shows them.
    """

    def __init__(self, spec: TokenizerSpec, library: TokenizerLibrary) -> None:
        self.spec = spec
        ids = {**library.added_tokens, **library.control_tokens}
        self.dividers = {ids[control.name]: control.name for control in DIVIDERS if control.name in ids}
        self._library = library

    @property
    def control_tokens(self) -> Mapping[str, int]:
        """Ids of the control tokens by name, such as `</s>`."""
        return self._library.control_tokens

    @property
    def added_tokens(self) -> Mapping[str, int]:
        """Ids of the tokens that are found in any text by their names, though they are no control tokens.

        In a text by itself they mean what the tokenizer's file says. In a chat, most are control tokens too. Those of
        whitespace are left out, since any template writes some.
        """
        return {name: token_id for name, token_id in self._library.added_tokens.items() if not name.isspace()}

    def check_length(self, characters: int, room: int | None) -> None:
        """Raise `UserError` for a text that cannot fit into `room` tokens (None: any number), before it is encoded.

        No token stands for more characters than the longest one.
        """
        if room is not None and characters > room and characters > room * self._library.longest_token:
            raise UserError(
                f"the text has {characters} characters, and the {room} slots of the caches hold at most "
                f"{room * self._library.longest_token}; shorten it, or compile with a larger shape.cache_len"
            )

    def encode(self, text: str, *, add_bos: bool | None = None) -> list[int]:
        """Ids of a text; text that looks like a control token stays text.

        `add_bos` decides whether bos comes first; by default, the model's convention does. Raises `UserError` if the
        text is very long or holds lone surrogates, which Python makes of bytes on the command line that are not UTF-8.
        """
        _check_text(text)
        wants_bos = self.spec.add_bos if add_bos is None else add_bos
        ids = self._library.encode(text)
        return [self.spec.bos_id, *ids] if wants_bos and self.spec.bos_id is not None else ids

    def encode_rendered(
        self, text: str, stand_ins: Mapping[str, str] | None = None, controls: Collection[str] = ()
    ) -> list[int]:
        """Ids of text written by a chat template, which adds bos and other control tokens by name.

        `stand_ins` maps characters to the texts that they stand for, in which nothing is a control token. `controls`
        are those of `added_tokens` that count as control tokens here. Raises `UserError` like `encode`.
        """
        _check_text(text)
        return self._library.with_controls(frozenset(controls)).encode_rendered(text, stand_ins or {})

    def encode_with_controls(self, text: str) -> list[int]:
        """Ids of a text in which the names of control tokens are those tokens.

        bos comes first by the model's convention, unless the text begins with its name. Raises `UserError` like
        `encode`.
        """
        ids = self.encode_rendered(text)
        bos_id = self.spec.bos_id
        return ids if not self.spec.add_bos or bos_id is None or ids[:1] == [bos_id] else [bos_id, *ids]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, control tokens left out; incomplete characters become U+FFFD."""
        stream = self.stream()
        pieces = [stream.push(token_id) for token_id in ids]
        return "".join(pieces) + stream.flush()

    def stream(self, after: Sequence[int] = ()) -> StreamDecoder:
        """A decoder for ids that arrive one by one.

        `after` are the ids that they continue, so that a space between the two is kept.
        """
        return StreamDecoder(self._library.decode, after)

    def text_stream(self, stops: Sequence[str], after: Sequence[int] = ()) -> TextStream:
        """The text of ids that arrive one by one, up to the first stop string; `after` is as for `stream`.

        A stop string that is the name of a control token or a divider stands for the token. Raises `UserError` if one
        is empty.
        """
        ids = {**{name: token_id for token_id, name in self.dividers.items()}, **self.control_tokens}
        stop_ids = {ids[stop]: stop for stop in stops if stop in ids}
        return TextStream(self.stream(after), stops, stop_ids, self.dividers)

    def token_text(self, token_id: int) -> str | None:
        """The vocabulary's entry for an id, such as `</s>`; None outside the vocabulary."""
        return self._library.token_text(token_id)

    def token_bytes(self, token_id: int) -> bytes | None:
        """The bytes that an id adds to a text; None for ids that a plain text has no use for.

        These are the control tokens, ids that end a text, dividers, and what else was added to the vocabulary. Raises
        `UserError` for a tokenizer whose tokens do not stand for bytes one by one.
        """
        return None if token_id in self._without_text else self._library.token_bytes(token_id)

    @cached_property
    def _without_text(self) -> frozenset[int]:
        return frozenset(
            {*self.control_tokens.values(), *self.added_tokens.values(), *self.dividers, *self.spec.eos_ids}
        )

    @cached_property
    def drops_first_space(self) -> bool:
        """Whether a space at the start of a text is the tokenizer's own, which decoding leaves out."""
        ids = itertools.takewhile(lambda token_id: self.token_text(token_id) is not None, itertools.count())
        words = (token_id for token_id in ids if (self.token_bytes(token_id) or b"")[:2].strip().isalpha())
        spaced = next((token_id for token_id in words if (self.token_bytes(token_id) or b"")[:1] == b" "), None)
        return spaced is not None and not self._library.decode([spaced]).startswith(" ")


LIBRARIES: Mapping[str, Callable[[Path, TokenizerSpec], TokenizerLibrary]] = {
    "tokenizer.json": lambda path, _spec: JsonLibrary(path),
    "sentencepiece": lambda path, spec: SentencePieceLibrary(path, after_added=spec.text_after_added),
}


def open_tokenizer(spec: TokenizerSpec, folder: Path) -> Tokenizer:
    """Read the tokenizer file that `spec` names in `folder`.

    Raises `UserError` if the file is broken or lacks the bos that prompts begin with. It may lack ids that end a text:
    a model can have them all the same, and they need no name.
    """
    path = folder / spec.file
    tokenizer = Tokenizer(spec, LIBRARIES[spec.kind](path, spec))
    if spec.add_bos and spec.bos_id is not None and tokenizer.token_text(spec.bos_id) is None:
        raise UserError(
            f"{path} has no token {spec.bos_id}, which the manifest names as bos; compile the artifact again"
        )
    if spec.add_bos and spec.bos_id is None:
        raise UserError(f"the manifest beside {path} sets add_bos without a bos_id; compile the artifact again")
    return tokenizer


def _check_text(text: str) -> None:
    if len(text) > TEXT_LIMIT:
        raise UserError(f"the text has {len(text)} characters, expected at most {TEXT_LIMIT}; shorten it")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the text is not valid Unicode at character {error.start}: pass it as UTF-8") from error
