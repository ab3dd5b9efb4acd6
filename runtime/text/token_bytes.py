"""A tokenizer as the package llguidance takes it: the bytes of each id, and ids of bytes."""

from functools import cached_property

from runtime.errors import UserError
from runtime.text.byte_levels import BYTE_PIECE
from runtime.text.tokenizer import Tokenizer

SPECIAL = b"\xff"  # begins the name of an id without text, since no UTF-8 holds it
IN_FRONT = "\n"  # behind a line break, no tokenizer adds a space


class TokenBytes:
    """The bytes of the ids below `size`; ids without text have names that no text holds.

    The attributes are those that the package reads. It only calls it for text that a grammar leaves no choice about, so
    that this text is divided into tokens as the model is used to.
    """

    def __init__(self, tokenizer: Tokenizer, size: int) -> None:
        self._tokenizer = tokenizer
        found = [tokenizer.token_bytes(token_id) for token_id in range(size)]
        single = [token_id for token_id, token in enumerate(found) if token is not None and len(token) == 1]
        pieces = [token_id for token_id in single if BYTE_PIECE.fullmatch(tokenizer.token_text(token_id) or "")]
        letters = {found[token_id] for token_id in set(single).difference(pieces)}
        for token_id in pieces:
            # a byte that a letter stands for too is not written as a byte; at the start, it would be another text
            if found[token_id] in letters:
                found[token_id] = None
        self.tokens = [token or b"%s<[%d]>" % (SPECIAL, token_id) for token_id, token in enumerate(found)]
        self.special_token_ids = [token_id for token_id, token in enumerate(found) if not token]
        self.eos_token_id = next(token_id for token_id in tokenizer.spec.eos_ids if token_id < size)
        self.bos_token_id = tokenizer.spec.bos_id

    def __call__(self, text: bytes) -> list[int]:
        """Ids whose bytes are exactly those of the text, within a longer text."""
        try:
            ids = self._tokenizer.encode(IN_FRONT + text.decode(), add_bos=False)
        except (UnicodeDecodeError, UserError):
            return self._longest_first(text)
        for begin in range(len(ids)):
            if b"".join(self.tokens[token_id] for token_id in ids[begin:]) == text:
                return ids[begin:]
        return self._longest_first(text)  # the line break is in one token with the text, or the tokenizer changes it

    def _longest_first(self, text: bytes) -> list[int]:
        ids = []
        while text:
            lengths = range(min(len(text), self._longest), 0, -1)
            length = next((length for length in lengths if text[:length] in self._ids), None)
            if length is None:  # a byte that no id has; the package then leaves the choice of ids to the model
                break
            ids.append(self._ids[text[:length]])
            text = text[length:]
        return ids

    @cached_property
    def _ids(self) -> dict[bytes, int]:
        return {token: token_id for token_id, token in reversed(list(enumerate(self.tokens)))}

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self.tokens))
