"""Ids of tool calls: new ones, and nine letters or digits for those of other software."""

import hashlib
import itertools
import re
import secrets
import string
from collections.abc import Iterator, Mapping, Sequence
from typing import cast

from runtime.text.messages import Message, ToolCall

ID_LENGTH = 9
LETTERS = string.ascii_letters + string.digits
WELL_FORMED_ID = re.compile(rf"[a-zA-Z0-9]{{{ID_LENGTH}}}")


def new_call_id() -> str:
    """An id for a call whose format has none: nine letters or digits, which every format can write."""
    return "".join(secrets.choice(LETTERS) for _ in range(ID_LENGTH))


def with_short_ids(messages: Sequence[Message]) -> list[Message]:
    """The messages with ids of nine letters or digits, of calls and results alike; ids that have this form stay.

    Others, such as `call_...` or a UUID, become part of their SHA-256 sum. Different ids stay different, and the ids of
    a conversation stay the same as it grows. Ids that are missing or empty are left for the checks of the format.
    """
    ids = list(dict.fromkeys(itertools.chain.from_iterable(map(_ids_of, messages))))
    taken = {call_id for call_id in ids if WELL_FORMED_ID.fullmatch(call_id)}
    if len(taken) == len(ids):
        return list(messages)
    short: dict[str, str] = {}
    for call_id in ids:
        short[call_id] = call_id if call_id in taken else next(one for one in _short_ids(call_id) if one not in taken)
        taken.add(short[call_id])
    return [_renamed(message, short) for message in messages]


def _ids_of(message: Message) -> Iterator[str]:
    for call in message.get("tool_calls", ()):
        if call.get("id"):
            yield call["id"]
    if message.get("tool_call_id"):
        yield message["tool_call_id"]


def _short_ids(call_id: str) -> Iterator[str]:
    """Nine letters or digits that depend on an id, and others in case that these are taken."""
    for number in itertools.count():
        digest = hashlib.sha256(f"{number}:{call_id}".encode("utf-8", "surrogatepass")).digest()
        value = int.from_bytes(digest)
        yield "".join(LETTERS[value // len(LETTERS) ** place % len(LETTERS)] for place in range(ID_LENGTH))


def _renamed(message: Message, short: Mapping[str, str]) -> Message:
    renamed = dict(message)
    if "tool_calls" in message:
        renamed["tool_calls"] = [
            cast(ToolCall, {**call, **_short(call, "id", short)}) for call in message["tool_calls"]
        ]
    return cast(Message, {**renamed, **_short(message, "tool_call_id", short)})


def _short(holder: Mapping[str, object], key: str, short: Mapping[str, str]) -> dict[str, str]:
    return {key: short[str(holder[key])]} if holder.get(key) in short else {}
