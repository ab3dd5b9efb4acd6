"""Text to token ids and back, with the tokenizer file that the artifact contains.

The library (`tokenizers` or `sentencepiece`) is imported only when a tokenizer is opened.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from runtime.artifact.manifest import TokenizerSpec
from runtime.errors import UserError
from runtime.text.stream import StreamDecoder

if TYPE_CHECKING:
    from tokenizers import Encoding


class TokenizerLibrary(Protocol):
    """The interface of a tokenizer library; it does not handle bos."""

    @property
    def control_tokens(self) -> Mapping[str, int]:
        """Ids of the control tokens by name."""

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


class Tokenizer:
    """A tokenizer and its conventions: whether bos comes first, and which ids end a text."""

    def __init__(self, spec: TokenizerSpec, library: TokenizerLibrary) -> None:
        self.spec = spec
        self._library = library

    @property
    def control_tokens(self) -> Mapping[str, int]:
        """Ids of the control tokens by name, such as `</s>`."""
        return self._library.control_tokens

    def encode(self, text: str, *, add_bos: bool | None = None) -> list[int]:
        """Ids of a text; text that looks like a control token stays text.

        `add_bos` decides whether bos comes first; by default, the model's convention does. Raises `UserError` if the
        text holds lone surrogates, which Python makes of bytes on the command line that are not UTF-8.
        """
        _check_unicode(text)
        wants_bos = self.spec.add_bos if add_bos is None else add_bos
        ids = self._library.encode(text)
        return [self.spec.bos_id, *ids] if wants_bos and self.spec.bos_id is not None else ids

    def encode_rendered(self, text: str, stand_ins: Mapping[str, str] | None = None) -> list[int]:
        """Ids of text written by a chat template, which adds bos and other control tokens by name.

        `stand_ins` maps characters to the texts that they stand for, in which nothing is a control token. Raises
        `UserError` like `encode`.
        """
        _check_unicode(text)
        return self._library.encode_rendered(text, stand_ins or {})

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

    def token_text(self, token_id: int) -> str | None:
        """The vocabulary's entry for an id, such as `</s>`; None outside the vocabulary."""
        return self._library.token_text(token_id)


class JsonLibrary:
    """`tokenizer.json`, read by the package tokenizers. Raises `UserError` if the file does not load."""

    def __init__(self, path: Path) -> None:
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more specific
            raise _broken(path, error) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        added = self._tokenizer.get_added_tokens_decoder()
        self.control_tokens: Mapping[str, int] = {
            token.content: token_id for token_id, token in added.items() if token.special
        }

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without those that the file's post-processor would add."""
        self._tokenizer.encode_special_tokens = True  # meaning: encode them as text
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_rendered(self, text: str, stand_ins: Mapping[str, str]) -> list[int]:
        """Ids from the library; a stretch between control tokens that holds a stand-in is encoded again by itself."""
        self._tokenizer.encode_special_tokens = False
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        if not stand_ins:
            return list(encoding.ids)
        meant = str.maketrans(dict(stand_ins))
        ids: list[int] = []
        next_token = next_character = 0
        for token, start, end in [*self._controls(encoding, text), (len(encoding.ids), len(text), len(text))]:
            stretch = text[next_character:start]
            if stand_ins.keys().isdisjoint(stretch):
                ids += encoding.ids[next_token:token]
            else:
                ids += self._encode_stretch(stretch.translate(meant), at_start=not ids)
            ids += encoding.ids[token : token + 1]
            next_token, next_character = token + 1, end
        return ids

    def _controls(self, encoding: "Encoding", text: str) -> Iterator[tuple[int, int, int]]:
        """Indices of the control tokens, and where their names begin and end in the text.

        The id alone does not tell: a model may use a control token's id for other text, as with <unk>.
        """
        for token, (token_id, (start, end)) in enumerate(zip(encoding.ids, encoding.offsets, strict=True)):
            if self.control_tokens.get(text[start:end].strip()) == token_id:
                yield token, start, end

    def _encode_stretch(self, text: str, *, at_start: bool) -> list[int]:
        """Ids of a part of a text; some tokenizers put a space before a whole text, but not before a later part."""
        space = self._tokenizer.pre_tokenizer
        if at_start or getattr(space, "prepend_scheme", None) != "first":
            return self.encode(text)
        space.prepend_scheme = "never"
        try:
            return self.encode(text)
        finally:
            space.prepend_scheme = "first"

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, without special tokens."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def token_text(self, token_id: int) -> str | None:
        """The vocabulary's entry for an id."""
        text = self._tokenizer.id_to_token(token_id)
        return None if text is None else str(text)


class SentencePieceLibrary:
    """`tokenizer.model`, read by the package sentencepiece. Raises `UserError` if the file does not load."""

    def __init__(self, path: Path) -> None:
        import sentencepiece

        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
        except (OSError, RuntimeError) as error:
            raise _broken(path, error) from error
        self._size = self._model.vocab_size()
        if self._size == 0:  # the library accepts an empty file as a model
            raise _broken(path, ValueError("its vocabulary is empty"))
        self.control_tokens: Mapping[str, int] = {
            self._model.id_to_piece(i): i for i in range(self._size) if self._model.is_control(i)
        }
        longest_first = sorted(self.control_tokens, key=len, reverse=True)
        self._control_pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})" if longest_first else r"(?!)")

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without bos."""
        return list(self._model.encode(text))

    def encode_rendered(self, text: str, stand_ins: Mapping[str, str]) -> list[int]:
        """Ids of a text; each stretch between control tokens is encoded alone, as in Mistral's reference encoder."""
        meant = str.maketrans(dict(stand_ins))
        ids: list[int] = []
        for part in self._control_pattern.split(text):
            if part in self.control_tokens:
                ids.append(self.control_tokens[part])
            else:  # the library puts a space before each text; a space from the template counts as that one
                ids += self._model.encode((part.removeprefix(" ") if ids else part).translate(meant))
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, without control pieces and ids beyond the vocabulary, which a padded embedding may produce."""
        return str(self._model.decode([token_id for token_id in ids if token_id < self._size]))

    def token_text(self, token_id: int) -> str | None:
        """The vocabulary's entry for an id."""
        return str(self._model.id_to_piece(token_id)) if 0 <= token_id < self._size else None


LIBRARIES: dict[str, type[JsonLibrary] | type[SentencePieceLibrary]] = {
    "tokenizer.json": JsonLibrary,
    "sentencepiece": SentencePieceLibrary,
}


def open_tokenizer(spec: TokenizerSpec, folder: Path) -> Tokenizer:
    """Read the tokenizer file that `spec` names in `folder`.

    Raises `UserError` if the file is broken or lacks ids that `spec` names.
    """
    path = folder / spec.file
    tokenizer = Tokenizer(spec, LIBRARIES[spec.kind](path))
    for token_id in (*spec.eos_ids, *(() if spec.bos_id is None else (spec.bos_id,))):
        if tokenizer.token_text(token_id) is None:
            raise UserError(
                f"{path} has no token {token_id}, which the manifest names as bos or eos; compile the artifact again"
            )
    if spec.add_bos and spec.bos_id is None:
        raise UserError(f"the manifest beside {path} sets add_bos without a bos_id; compile the artifact again")
    return tokenizer


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the text is not valid Unicode at character {error.start}: pass it as UTF-8") from error


def _broken(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} does not load as a tokenizer: {error}; compile the artifact again")
