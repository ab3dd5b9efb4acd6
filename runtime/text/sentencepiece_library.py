"""`tokenizer.model`, read by the package sentencepiece."""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

from runtime.artifact.manifest import TextAfterAdded
from runtime.errors import refusing
from runtime.text.byte_levels import bytes_of_piece
from runtime.text.sentencepiece_pieces import pieces_of, with_control_pieces, without_space_in_front


class SentencePieceLibrary:
    """`tokenizer.model`, read by the package sentencepiece. Raises `UserError` if the file does not load.

    `after_added` says what a text is behind an added token. The library itself finds user-defined pieces within words;
    transformers and llama.cpp split the text at them before the library sees it, which no space in front of one
    survives.
    """

    def __init__(
        self, path: Path, controls: frozenset[str] = frozenset(), *, after_added: TextAfterAdded = "joined"
    ) -> None:
        import sentencepiece

        with refusing(f"{path} does not load as a tokenizer", "compile the artifact again"):
            data = path.read_bytes()
            pieces = list(pieces_of(data))
            data = with_control_pieces(data, pieces, controls)
            self._model = self._later = sentencepiece.SentencePieceProcessor(model_proto=data)
            if after_added == "bare":
                self._later = sentencepiece.SentencePieceProcessor(model_proto=without_space_in_front(data))
            self._size = self._model.vocab_size()
            if self._size == 0:  # the library accepts an empty file as a model
                raise ValueError("its vocabulary is empty")
            self.control_tokens: Mapping[str, int] = {
                self._model.id_to_piece(i): i for i in range(self._size) if self._model.is_control(i)
            }
        self._path = path
        self._after_added = after_added
        self._with_controls: dict[frozenset[str], SentencePieceLibrary] = {}
        self.added_tokens: Mapping[str, int] = {
            piece.text: i for i, piece in enumerate(pieces) if piece.user_defined and piece.text not in controls
        }
        self._control_pattern = _any_of(self.control_tokens)
        self._added_pattern = _any_of(self.added_tokens if after_added != "joined" else ())

    @cached_property
    def longest_token(self) -> int:
        """The most characters of a text that one token may stand for."""
        return max((len(self._model.id_to_piece(i)) for i in range(self._size)), default=1)

    def with_controls(self, names: frozenset[str]) -> "SentencePieceLibrary":
        """The same file with these user-defined pieces as control tokens, which the library finds in no text."""
        changed = names.intersection(self.added_tokens)
        if not changed:
            return self
        if changed not in self._with_controls:
            self._with_controls[changed] = SentencePieceLibrary(self._path, changed, after_added=self._after_added)
        return self._with_controls[changed]

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without bos."""
        return self._encode_stretch(text, at_start=True)

    def encode_rendered(self, text: str, stand_ins: Mapping[str, str]) -> list[int]:
        """Ids of a text; each stretch between control tokens is encoded alone, as in Mistral's reference encoder."""
        meant = str.maketrans(dict(stand_ins))
        ids: list[int] = []
        for part in self._control_pattern.split(text):
            if part in self.control_tokens:
                ids.append(self.control_tokens[part])
                continue
            if ids and self._after_added != "bare":
                part = part.removeprefix(" ")  # a space from the template counts as that which the library puts there
            ids += self._encode_stretch(part.translate(meant), at_start=not ids)
        return ids

    def _encode_stretch(self, text: str, *, at_start: bool) -> list[int]:
        """Ids of a text without control tokens; `at_start` says whether nothing comes before it."""
        ids: list[int] = []
        with refusing(f"{self._path} cannot encode this text", "change the text"):
            for part in self._added_pattern.split(text):
                if self._after_added != "joined" and part in self.added_tokens:
                    ids.append(self.added_tokens[part])
                elif part:
                    ids += (self._model if at_start and not ids else self._later).encode(part)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, without control pieces and ids beyond the vocabulary, which a padded embedding may produce."""
        with refusing(f"{self._path} cannot decode these tokens", "compile the artifact again"):
            return str(self._model.decode([token_id for token_id in ids if token_id < self._size]))

    def token_text(self, token_id: int) -> str | None:
        """The vocabulary's entry for an id."""
        return str(self._model.id_to_piece(token_id)) if 0 <= token_id < self._size else None

    def token_bytes(self, token_id: int) -> bytes | None:
        """The bytes that an id adds to a text; None for an id without text."""
        entry = self.token_text(token_id)
        model = self._model
        if entry is None or model.is_control(token_id) or model.is_unknown(token_id) or model.is_unused(token_id):
            return None
        return bytes_of_piece(entry)


def _any_of(names: Iterable[str]) -> re.Pattern[str]:
    """A pattern that splits a text at any of the names, the longest first, and keeps them."""
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})" if longest_first else r"(?!)")
