"""`tokenizer.model`, read by the package sentencepiece."""

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

from runtime.errors import refusing
from runtime.text.sentencepiece_pieces import pieces_of, with_control_pieces


class SentencePieceLibrary:
    """`tokenizer.model`, read by the package sentencepiece. Raises `UserError` if the file does not load."""

    def __init__(self, path: Path, controls: frozenset[str] = frozenset()) -> None:
        import sentencepiece

        with refusing(f"{path} does not load as a tokenizer", "compile the artifact again"):
            data = path.read_bytes()
            pieces = list(pieces_of(data))
            self._model = sentencepiece.SentencePieceProcessor(model_proto=with_control_pieces(data, pieces, controls))
            self._size = self._model.vocab_size()
            if self._size == 0:  # the library accepts an empty file as a model
                raise ValueError("its vocabulary is empty")
            self.control_tokens: Mapping[str, int] = {
                self._model.id_to_piece(i): i for i in range(self._size) if self._model.is_control(i)
            }
        self._path = path
        self._with_controls: dict[frozenset[str], SentencePieceLibrary] = {}
        self.added_tokens: Mapping[str, int] = {
            piece.text: i for i, piece in enumerate(pieces) if piece.user_defined and piece.text not in controls
        }
        longest_first = sorted(self.control_tokens, key=len, reverse=True)
        self._control_pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})" if longest_first else r"(?!)")

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
            self._with_controls[changed] = SentencePieceLibrary(self._path, changed)
        return self._with_controls[changed]

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without bos."""
        with refusing(f"{self._path} cannot encode this text", "change the text"):
            return list(self._model.encode(text))

    def encode_rendered(self, text: str, stand_ins: Mapping[str, str]) -> list[int]:
        """Ids of a text; each stretch between control tokens is encoded alone, as in Mistral's reference encoder."""
        meant = str.maketrans(dict(stand_ins))
        ids: list[int] = []
        for part in self._control_pattern.split(text):
            if part in self.control_tokens:
                ids.append(self.control_tokens[part])
            else:  # the library puts a space before each text; a space from the template counts as that one
                ids += self.encode((part.removeprefix(" ") if ids else part).translate(meant))
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, without control pieces and ids beyond the vocabulary, which a padded embedding may produce."""
        with refusing(f"{self._path} cannot decode these tokens", "compile the artifact again"):
            return str(self._model.decode([token_id for token_id in ids if token_id < self._size]))

    def token_text(self, token_id: int) -> str | None:
        """The vocabulary's entry for an id."""
        return str(self._model.id_to_piece(token_id)) if 0 <= token_id < self._size else None
