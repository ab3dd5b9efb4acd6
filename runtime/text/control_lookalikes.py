"""Text in messages that looks like a control token, kept apart from the control tokens that a chat template writes.

A template mixes both into one text. So each look-alike goes through the template as one private-use character, which is
turned back into text once the control tokens have been found. A template may still trim, compare or measure what it is
given.

A template that changes its texts, for example to lower case, may make a name of what was none. Then every character of
messages with which names are written goes through it as a private-use character, so that it can write no name of them.
"""

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import TypeVar, cast
from urllib.parse import quote

from runtime.errors import UserError
from runtime.text.messages import Function, FunctionCall, Message, TextPart, ThinkingPart, Tool, ToolCall

PRIVATE_USE = range(0xF0000, 0x10FFFE)
KINDS = (("type", "function"), ("type", "text"), ("type", "thinking"))  # what templates compare, as they do roles
KEYS = frozenset().union(
    *(form.__annotations__ for form in (Message, ToolCall, FunctionCall, Tool, Function, TextPart, ThinkingPart))
)
# Written in names, and seldom in words. `&` begins what some filters turn into other characters.
PUNCTUATION = frozenset('!"#$%&()*+/:;<=>?@[\\]^_`{|}~')
T = TypeVar("T")


def is_markup(name: str) -> bool:
    """Whether a token's name is written as no word is."""
    return not PUNCTUATION.isdisjoint(name)


class StandIns:
    """Stand-ins for one conversation; `meanings` maps each to its text.

    `given` is everything that is rendered: no character that occurs in it is used as a stand-in. `tested` are names
    that stay as they are in the model's own messages, since templates look for them there, as for `</think>`. With
    `all_punctuation`, all punctuation of names is hidden, wherever it is.
    """

    def __init__(
        self, names: Collection[str], given: object, tested: Collection[str] = (), *, all_punctuation: bool = False
    ) -> None:
        self.meanings: dict[str, str] = {}
        self._by_text: dict[str, str] = {}
        everything = _Hidden.of(names, all_punctuation=all_punctuation)
        own = everything if all_punctuation else _Hidden.of(set(names) - set(tested))
        self._by_role = {"assistant": own}
        self._usual = everything
        taken = frozenset(json.dumps(given, ensure_ascii=False))
        self._free = (chr(code) for code in PRIVATE_USE if chr(code) not in taken)

    def hide(self, value: T, hidden: "_Hidden | None" = None) -> T:
        """The same value with the look-alikes in its texts hidden.

        Keys, roles and the kinds of tools and parts are compared by templates, so only whole names are hidden in them.
        The keys that messages and tools always have stay as they are.
        """
        hidden = hidden or self._usual
        if isinstance(value, str):
            return cast(T, self._hide_text(value, hidden))
        if isinstance(value, list | tuple):
            return cast(T, [self.hide(item, hidden) for item in value])
        if not isinstance(value, dict):
            return value
        hidden = self._by_role.get(str(value.get("role")), hidden)
        compared = {key for key, item in value.items() if key == "role" or (key, item) in KINDS}
        return cast(
            T,
            {
                key if key in KEYS else self._hide_names(key, self._usual): self._hide_names(item, self._usual)
                if key in compared
                else self.hide(item, hidden)
                for key, item in value.items()
            },
        )

    def found_again(self, text: str) -> str:
        """A rendered text in which stand-ins that were written as escape sequences are stand-ins again.

        Such a stand-in means the escaped form of its text.
        """
        for character, meaning in list(self.meanings.items()):
            for escaped in (lambda value: json.dumps(value)[1:-1], quote):
                if escaped(character) in text:
                    text = text.replace(escaped(character), self._stand_in(escaped(meaning)))
        return text

    def _hide_names(self, value: T, hidden: "_Hidden") -> T:
        if not isinstance(value, str):
            return value
        return cast(T, hidden.pattern.sub(lambda match: self._stand_in(match[0]), value))

    def _hide_text(self, text: str, hidden: "_Hidden") -> str:
        text = self._hide_names(text, hidden)
        core = text.strip()  # as templates do
        if not core:
            return text
        start = text.index(core)
        return text[:start] + self._hide_edges(core, hidden) + text[start + len(core) :]

    def _hide_edges(self, core: str, hidden: "_Hidden") -> str:
        """Hide the ends that could form a control token together with text that the template puts beside them."""
        names = hidden.names
        if any(core in name for name in names):
            return self._stand_in(core)
        head = max((n for name in names for n in range(1, len(name)) if core.startswith(name[-n:])), default=0)
        tail = max((n for name in names for n in range(1, len(name)) if core.endswith(name[:n])), default=0)
        if head + tail > len(core):
            return self._stand_in(core)
        first = self._stand_in(core[:head]) if head else ""
        last = self._stand_in(core[len(core) - tail :]) if tail else ""
        return first + core[head : len(core) - tail] + last

    def _stand_in(self, text: str) -> str:
        if text not in self._by_text:
            character = next(self._free, None)
            if character is None:
                raise UserError(
                    "the conversation uses every private-use character of Unicode, but chat templates need some; "
                    "leave some out"
                )
            self._by_text[text] = character
            self.meanings[character] = text
        return self._by_text[text]


@dataclass(frozen=True)
class _Hidden:
    """What is hidden in a text: whatever the pattern finds, and ends of the text that are ends of names."""

    names: frozenset[str]
    pattern: re.Pattern[str]

    @classmethod
    def of(cls, names: Collection[str], *, all_punctuation: bool = False) -> "_Hidden":
        found: list[str] = sorted(names, key=len, reverse=True)
        if all_punctuation:
            found = sorted({*PUNCTUATION.intersection("".join(names)), "&"})
        return cls(frozenset(names), re.compile("|".join(map(re.escape, found)) if found else r"(?!)"))
