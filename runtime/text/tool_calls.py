"""Tool calls out of a reply as it comes, in the forms that the instruct formats have.

v2, v3 and v7 write a JSON list behind one [TOOL_CALLS]; later versions write a [TOOL_CALLS] for each call, with the
arguments behind [ARGS] and, in v11, an id behind [CALL_ID]. A call has begun as soon as its name and the `{` of its
arguments are there; its arguments are what the model writes from there to the `}`. What becomes no call is text.
"""

import re
from collections.abc import Callable, Generator, Mapping

from runtime.text.call_ids import WELL_FORMED_ID, new_call_id
from runtime.text.call_syntax import MalformedError, read_container, read_string, skip_space, skip_value, string_value
from runtime.text.deltas import ArgumentsDelta, CallDelta, Delta, TextDelta
from runtime.text.instruct_formats import ARGUMENTS, CALL_ID
from runtime.text.message_checks import FUNCTION_NAME

ANY_ID = re.compile(r"\S{1,64}")
Reader = Generator[None, str, None]


class CallNumbers:
    """Numbers the calls of a reply; an id that is missing, malformed or given twice is replaced by a new one."""

    def __init__(self, new_id: Callable[[], str] = new_call_id) -> None:
        self._new_id = new_id
        self.ids: list[str] = []

    def begin(self, name: str, call_id: str | None) -> CallDelta:
        """The beginning of the next call."""
        usable = call_id is not None and WELL_FORMED_ID.fullmatch(call_id) and call_id not in self.ids
        self.ids.append(call_id if usable and call_id is not None else self._new_id())
        return CallDelta(len(self.ids) - 1, self.ids[-1], name)


class CallReader:
    """Reads what follows one [TOOL_CALLS]: its text, and the control tokens [CALL_ID] and [ARGS] in it."""

    def __init__(self, numbers: CallNumbers) -> None:
        self._numbers = numbers
        self._found: list[Delta] = []
        self._held = ""  # text of which it is not known yet whether it belongs to a call
        self._arguments: str | None = None  # of a call that has begun, as far as they are not in `_found` yet
        self._in_begun_call = False  # whether the text that is held stands behind arguments, in the same object
        self._named: tuple[str, str | None] | None = None  # name and id of a call that has not begun
        self._early = ""  # arguments that stand before their call's name
        self._reader: Reader | None = self._name_or_list()  # None: whatever comes is text
        next(self._reader)

    def push(self, text: str) -> list[Delta]:
        """What more text gives."""
        for place, character in enumerate(text):
            if self._reader is None:
                self._found.append(TextDelta(text[place:]))
                break
            if self._arguments is not None:
                self._arguments += character
            else:
                self._held += character
            self._send(character)
        return self._taken()

    def divide(self, name: str) -> list[Delta]:
        """What the control token [CALL_ID] or [ARGS] gives; it is text nowhere."""
        self._send(name)
        return self._taken()

    def end(self, *, cut: bool) -> list[Delta]:
        """What is left at the end; a call that was `cut` short begins if its name is there."""
        if cut and self._named is not None:
            self._begin(self._early)
        elif self._held.strip() and not self._in_begun_call:
            self._found.append(TextDelta(self._held))
        self._held, self._reader = "", None
        return self._taken()

    def _send(self, symbol: str) -> None:
        if self._reader is None:
            return
        try:
            self._reader.send(symbol)
        except MalformedError:
            self._flush_arguments()
            self._arguments = self._named = self._reader = None
            if self._held:
                self._found.append(TextDelta(self._held))
            self._held = ""

    def _taken(self) -> list[Delta]:
        self._flush_arguments()
        found, self._found = self._found, []
        return found

    def _flush_arguments(self) -> None:
        if self._arguments:
            self._found.append(ArgumentsDelta(len(self._numbers.ids) - 1, self._arguments))
            self._arguments = ""

    def _begin(self, arguments: str) -> None:
        """Begin the call that `_named` tells of with its first arguments; all text that was held belongs to it."""
        assert self._named is not None
        self._found.append(self._numbers.begin(*self._named))
        self._held, self._named, self._early = "", None, ""
        self._arguments = arguments

    # What comes, in order

    def _name_or_list(self) -> Reader:
        first = yield from skip_space()
        yield from self._listed_calls() if first == "[" else self._single_call(first)
        while True:
            if not (yield).isspace():
                raise MalformedError

    def _single_call(self, first: str) -> Reader:
        name, symbol = yield from _up_to_control(first, FUNCTION_NAME)
        call_id = None
        if symbol == CALL_ID.name:
            call_id, symbol = yield from _up_to_control((yield), ANY_ID)
        if not name or symbol != ARGUMENTS.name:
            raise MalformedError
        self._named = name, call_id
        yield from self._streamed_arguments((yield from skip_space()))

    def _listed_calls(self) -> Reader:
        symbol = ","
        while symbol == ",":
            if (yield from skip_space()) != "{":
                raise MalformedError
            yield from self._listed_call()
            symbol = yield from skip_space()
            if symbol not in (",", "]"):
                raise MalformedError
            self._held = ""

    def _listed_call(self) -> Reader:
        """One object of the list, whose first character has been read."""
        told: dict[str, str] = {}
        symbol = ","
        while symbol == ",":
            key, first = yield from _key_and_first()
            if key == "arguments" and first == "{" and not self._in_begun_call:
                if self._named is None:
                    self._early = yield from read_container(first)
                else:
                    yield from self._streamed_arguments(first)
                    self._in_begun_call = True
                symbol = yield from skip_space()
            elif key in ("name", "id") and first == '"':
                told[key] = string_value((yield from read_string()))
                symbol = yield from skip_space()
            else:
                symbol = yield from skip_value(first)
            self._note(told)
        if symbol != "}" or not self._in_begun_call:
            raise MalformedError
        self._held, self._in_begun_call = "", False

    def _note(self, told: Mapping[str, str]) -> None:
        """Note what is known of a call of the list; it begins here if its arguments stand before its name."""
        if self._in_begun_call or "name" not in told:
            return
        if not FUNCTION_NAME.fullmatch(told["name"]):
            raise MalformedError
        self._named = told["name"], told.get("id")
        if self._early:
            self._begin(self._early)
            self._flush_arguments()
            self._arguments, self._in_begun_call = None, True

    def _streamed_arguments(self, first: str) -> Reader:
        """The arguments of the call that `_named` tells of, which begins with their first character."""
        if first != "{":
            raise MalformedError
        self._begin(first)
        yield from read_container(first)
        self._flush_arguments()
        self._arguments = None


def _up_to_control(first: str, form: re.Pattern[str]) -> Generator[None, str, tuple[str, str]]:
    """The text up to a control token, without whitespace around it, and the token's name."""
    text, symbol = "", first
    while len(symbol) == 1:
        text += symbol
        if text.strip() and not form.fullmatch(text.strip()):
            raise MalformedError
        symbol = yield
    return text.strip(), symbol


def _key_and_first() -> Generator[None, str, tuple[str, str]]:
    """A key of an object, and the first symbol of its value."""
    if (yield from skip_space()) != '"':
        raise MalformedError
    key = string_value((yield from read_string()))
    if (yield from skip_space()) != ":":
        raise MalformedError
    return key, (yield from skip_space())
