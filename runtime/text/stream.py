"""The stream of generated steps, and its text: whole characters only, and nothing at or after a stop string."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

from runtime.errors import UserError

FinishReason = Literal["stop", "length"]
# written by tokenizer libraries for bytes that are not yet, or not at all, UTF-8
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# A character has at most four bytes, and an id at least one of them, so that no more than three ids wait for a whole
# character. Longer runs, of bytes that are no UTF-8 or of ids without text, would be decoded anew with each id.
MOST_SILENT = 8  # ids without text that are held back
MOST_HELD = 16  # ids that are held back in all
MOST_CONTEXT = 64  # ids before them: what matters is whether a text comes before, and how its last words join


@dataclass(frozen=True)
class Step:
    """One generated id.

    The last step has the finish reason: "stop" for an end of sequence or a stop string, "length" for a limit.
    """

    token_id: int
    logprobs: tuple[tuple[int, float], ...] | None = None  # (id, logprob) of the likeliest ids, before any filter
    finish_reason: FinishReason | None = None
    text: str = ""  # this step's addition to the text, which may lag behind the ids
    logprob: float | None = None  # of this id, before any filter, where log probabilities were asked for
    stop: str | None = None  # the stop string that ended the text


class StreamDecoder:
    """Turns ids into text one at a time; the pieces joined are the text of all ids.

    Decoding each id alone would be wrong: SentencePiece drops a space at the start of a text, and a character may span
    several byte tokens. So ids are held back until their text ends in a whole character, and each piece is their
    addition to the text of the ids just before them.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], after: Sequence[int] = ()) -> None:
        self._decode = decode
        self._context = list(after[-MOST_CONTEXT:])  # ids whose text has already been returned
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        """The text that this id completes; empty while a character is incomplete."""
        self._pending.append(token_id)
        text = self._new_text()
        if not text:
            del self._pending[MOST_SILENT:]  # an id that adds nothing to so many without text
            return ""
        if text.endswith(REPLACEMENT) and len(self._pending) <= MOST_HELD:
            return ""
        self._context, self._pending = self._pending, []
        return text

    def flush(self) -> str:
        """The text of the ids still held back, with U+FFFD for incomplete characters; call it once, at the end."""
        return self._new_text()

    def restart(self) -> str:
        """The text of the ids still held back; the next id begins a new text."""
        text = self.flush()
        self._context, self._pending = [], []
        return text

    def _new_text(self) -> str:
        known = self._decode(self._context)
        joined = self._decode([*self._context, *self._pending])
        if joined.startswith(known):
            return joined[len(known) :]
        return self._decode(self._pending)  # some libraries discard a whole run of byte tokens for a single wrong one


class TextStream:
    """Text of a stream of ids up to the first stop string; raises `UserError` if a stop string is empty.

    `stop_ids` are the control tokens that stop strings name, with these strings: such tokens have no text that could be
    searched. `dividers` are control tokens that end a text and begin another, so that no text is held back beyond them.
    """

    def __init__(
        self,
        decoder: StreamDecoder,
        stops: Sequence[str] = (),
        stop_ids: Mapping[int, str] = MappingProxyType({}),
        dividers: Collection[int] = (),
    ) -> None:
        if "" in stops:
            raise UserError(
                "a stop string is empty, expected at least one character; leave the option out to use no stop string"
            )
        self.stopped_by: str | None = None  # the stop string that has ended the text
        self._decoder = decoder
        self._stops = tuple(stops)
        self._stop_ids = dict(stop_ids)
        self._dividers = frozenset(dividers)
        self._held = ""

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the text."""
        return self.stopped_by is not None

    def push(self, token_id: int) -> str:
        """The text that is now certain to come before any stop string."""
        if token_id in self._stop_ids:
            text = self.flush()
            self.stopped_by = self.stopped_by or self._stop_ids[token_id]
            return text
        if token_id in self._dividers:
            return self._release(self._decoder.restart(), final=True)
        return self._release(self._decoder.push(token_id), final=False)

    def flush(self) -> str:
        """The rest of the text; call it once, at the end."""
        return self._release(self._decoder.flush(), final=True)

    def _release(self, text: str, *, final: bool) -> str:
        if self.stopped:
            return ""
        self._held += text
        found = [(place, stop) for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            place, self.stopped_by = min(found)
            return self._held[:place]
        keep = 0 if final else max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        released, self._held = self._held[:cut], self._held[cut:]
        return released


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `stop`."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)


def with_text(steps: Iterator[Step], text: TextStream) -> Iterator[Step]:
    """The steps with their text; they end early at a stop string. An end of sequence has no text."""
    for step in steps:
        added = "" if step.finish_reason == "stop" else text.push(step.token_id)
        if step.finish_reason is not None:
            added += text.flush()
        finish_reason = "stop" if text.stopped else step.finish_reason
        yield replace(step, text=added, finish_reason=finish_reason, stop=text.stopped_by)
        if finish_reason is not None:
            return
