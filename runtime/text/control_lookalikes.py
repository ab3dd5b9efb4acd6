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
from typing import TypeVar, cast
from urllib.parse import quote

from runtime.errors import UserError

PRIVATE_USE = range(0xF0000, 0x10FFFE)
# Written in names, and seldom in words. `&` begins what some filters turn into other characters.
PUNCTUATION = frozenset('!"#$%&()*+/:;<=>?@[\\]^_`{|}~')
T = TypeVar("T")


def is_markup(name: str) -> bool:
    """Whether a token's name is written as no word is."""
    return not PUNCTUATION.isdisjoint(name)


class StandIns:
    """Stand-ins for one conversation; `meanings` maps each to its text.

    `given` is everything that is rendered: no character that occurs in it is used as a stand-in. With `all_punctuation`,
    all punctuation of names is hidden, wherever it is.
    """

    def __init__(self, names: Collection[str], given: object, *, all_punctuation: bool = False) -> None:
        self.meanings: dict[str, str] = {}
        self._by_text: dict[str, str] = {}
        self._names = frozenset(names)
        hidden = sorted(names, key=len, reverse=True)
        if all_punctuation:
            hidden = sorted({*PUNCTUATION.intersection("".join(names)), "&"})
        self._pattern = re.compile("|".join(map(re.escape, hidden)) if hidden else r"(?!)")
        taken = frozenset(json.dumps(given, ensure_ascii=False))
        self._free = (chr(code) for code in PRIVATE_USE if chr(code) not in taken)

    def hide(self, value: T) -> T:
        """The same value with the look-alikes in its texts hidden.

        Keys, roles and the kind of a tool are compared by templates, so only whole names are hidden in them.
        """
        if isinstance(value, str):
            return cast(T, self._hide_text(value))
        if isinstance(value, list | tuple):
            return cast(T, [self.hide(item) for item in value])
        if isinstance(value, dict):
            compared = {key for key, item in value.items() if key == "role" or (key, item) == ("type", "function")}
            return cast(
                T,
                {
                    self._hide_names(key): self._hide_names(item) if key in compared else self.hide(item)
                    for key, item in value.items()
                },
            )
        return value

    def found_again(self, text: str) -> str:
        """A rendered text in which stand-ins that were written as escape sequences are stand-ins again.

        Such a stand-in means the escaped form of its text.
        """
        for character, meaning in list(self.meanings.items()):
            for escaped in (lambda value: json.dumps(value)[1:-1], quote):
                if escaped(character) in text:
                    text = text.replace(escaped(character), self._stand_in(escaped(meaning)))
        return text

    def _hide_names(self, value: T) -> T:
        if not isinstance(value, str):
            return value
        return cast(T, self._pattern.sub(lambda match: self._stand_in(match[0]), value))

    def _hide_text(self, text: str) -> str:
        text = self._hide_names(text)
        core = text.strip()  # as templates do
        if not core:
            return text
        start = text.index(core)
        return text[:start] + self._hide_edges(core) + text[start + len(core) :]

    def _hide_edges(self, core: str) -> str:
        """Hide the ends that could form a control token together with text that the template puts beside them."""
        if any(core in name for name in self._names):
            return self._stand_in(core)
        head = max((n for name in self._names for n in range(1, len(name)) if core.startswith(name[-n:])), default=0)
        tail = max((n for name in self._names for n in range(1, len(name)) if core.endswith(name[:n])), default=0)
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
