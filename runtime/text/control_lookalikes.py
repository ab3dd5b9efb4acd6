"""Text in messages that looks like a control token, kept apart from the control tokens that a chat template writes.

A template mixes both into one text. So each look-alike goes through the template as one private-use character, which is
turned back into text once the control tokens have been found. A template may still trim, compare or measure what it is
given.
"""

import json
import re
from collections.abc import Collection
from typing import TypeVar, cast

from runtime.errors import UserError

PRIVATE_USE = range(0xF0000, 0x10FFFE)
T = TypeVar("T")


class StandIns:
    """Stand-ins for one conversation; `meanings` maps each to its text.

    `given` is everything that is rendered: no character that occurs in it is used as a stand-in.
    """

    def __init__(self, names: Collection[str], given: object) -> None:
        self.meanings: dict[str, str] = {}
        self._by_text: dict[str, str] = {}
        self._names = frozenset(names)
        self._pattern = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) if names else r"(?!)")
        taken = frozenset(json.dumps(given, ensure_ascii=False))
        self._free = (chr(code) for code in PRIVATE_USE if chr(code) not in taken)

    def hide(self, value: T) -> T:
        """The same value with the look-alikes in its texts hidden.

        Keys, roles and the kind of a tool, which users do not write, stay as they are.
        """
        if isinstance(value, str):
            return cast(T, self._hide_text(value))
        if isinstance(value, list | tuple):
            return cast(T, [self.hide(item) for item in value])
        if isinstance(value, dict):
            kept = {key for key, item in value.items() if key == "role" or (key, item) == ("type", "function")}
            return cast(T, {key: item if key in kept else self.hide(item) for key, item in value.items()})
        return value

    def _hide_text(self, text: str) -> str:
        text = self._pattern.sub(lambda match: self._stand_in(match[0]), text)
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
