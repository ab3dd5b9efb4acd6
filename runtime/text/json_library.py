"""`tokenizer.json`, read by the package tokenizers."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.errors import UserError, refusing
from runtime.text.byte_levels import bytes_of_letters, bytes_of_piece

if TYPE_CHECKING:
    from tokenizers import Encoding


class JsonLibrary:
    """`tokenizer.json`, read by the package tokenizers. Raises `UserError` if the file does not load."""

    def __init__(self, path: Path, controls: frozenset[str] = frozenset()) -> None:
        import tokenizers

        with refusing(f"{path} does not load as a tokenizer", "compile the artifact again"):
            if controls:
                self._tokenizer = tokenizers.Tokenizer.from_str(_marked(path.read_bytes(), controls))
            else:
                self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            if getattr(self._tokenizer.model, "dropout", None):
                self._tokenizer.model.dropout = None  # for training: it leaves out merges at random
            added = self._tokenizer.get_added_tokens_decoder()
            has_normalizer = self._tokenizer.normalizer is not None
        self._path = path
        self._with_controls: dict[frozenset[str], JsonLibrary] = {}
        self.control_tokens: Mapping[str, int] = {
            token.content: token_id for token_id, token in added.items() if token.special
        }
        self.added_tokens: Mapping[str, int] = {
            token.content: token_id for token_id, token in added.items() if not token.special
        }
        # Tokens that the library does not find wherever their names are: only between spaces, or after the normalizer
        # has changed the text.
        self._hidden = frozenset(
            token.content for token in added.values() if token.single_word or (token.normalized and has_normalizer)
        )

    @cached_property
    def longest_token(self) -> int:
        """The most characters of a text that one token may stand for."""
        return max(map(len, self._tokenizer.get_vocab()), default=1)

    def with_controls(self, names: frozenset[str]) -> "JsonLibrary":
        """The same file with these tokens as special ones too, and all of those found wherever their names are.

        It is read again, since the library cannot change its tokens.
        """
        changed = names.intersection(self.added_tokens) | self._hidden.intersection((*names, *self.control_tokens))
        if not changed:
            return self
        if changed not in self._with_controls:
            self._with_controls[changed] = JsonLibrary(self._path, changed)
        return self._with_controls[changed]

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without those that the file's post-processor would add."""
        return list(self._encoded(text, controls=False).ids)

    def _encoded(self, text: str, *, controls: bool) -> "Encoding":
        """The library's encoding; with `controls`, names of control tokens in the text become those tokens."""
        self._tokenizer.encode_special_tokens = not controls
        with refusing(f"{self._path} cannot encode this text", "change the text"):
            return self._tokenizer.encode(text, add_special_tokens=False)

    def encode_rendered(self, text: str, stand_ins: Mapping[str, str]) -> list[int]:
        """Ids from the library; a stretch between control tokens that may hold another's name is encoded by itself.

        It may if it holds a stand-in, and if the library finds a control token there whose name is not in the text:
        some normalizers turn other text, such as full-width letters, into the name.
        """
        encoding = self._encoded(text, controls=True)
        controls = frozenset(self.control_tokens.values())
        meant = str.maketrans(dict(stand_ins))
        ids: list[int] = []
        next_token = next_character = 0
        for token, start, end in [*self._controls(encoding, text), (len(encoding.ids), len(text), len(text))]:
            stretch = text[next_character:start]
            found = encoding.ids[next_token:token]
            if stand_ins.keys().isdisjoint(stretch) and controls.isdisjoint(found):
                ids += found
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
        with refusing(f"{self._path} cannot decode these tokens", "compile the artifact again"):
            return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def token_text(self, token_id: int) -> str | None:
        """The vocabulary's entry for an id."""
        text = self._tokenizer.id_to_token(token_id)
        return None if text is None else str(text)

    def token_bytes(self, token_id: int) -> bytes | None:
        """The bytes that an id adds to a text; None for an id without text.

        Raises `UserError` for a tokenizer whose entries do not stand for bytes one by one.
        """
        entry = self.token_text(token_id)
        if entry is None or entry in self.control_tokens:
            return None
        return entry.encode() if entry in self.added_tokens else self._bytes_of(entry)

    @cached_property
    def _bytes_of(self) -> Callable[[str], bytes | None]:
        """How an entry becomes bytes, by the steps of the file's decoder."""
        decoder = self._tokenizer.decoder
        state = json.loads(decoder.__getstate__()) if decoder is not None else {"type": "none"}
        steps = {step["type"] for step in state.get("decoders", [state])}
        if "ByteLevel" in steps:
            return bytes_of_letters
        if steps & {"ByteFallback", "Metaspace"}:
            return bytes_of_piece
        raise UserError(
            f"{self._path} has a decoder of the kind {', '.join(sorted(steps))}, whose tokens do not stand for bytes "
            "one by one, which structured output needs; send the request without it"
        )


def _marked(data: bytes, names: frozenset[str]) -> str:
    """A tokenizer.json with some of its added tokens marked as special, and found wherever their names are."""
    file = json.loads(data)
    for token in file["added_tokens"]:
        if token["content"] in names:
            token |= {"special": True, "single_word": False, "normalized": False}
    return json.dumps(file, ensure_ascii=False)
