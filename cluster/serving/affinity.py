"""Which replica has probably seen the beginning of a prompt before."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import msgspec

CHUNK = 1024  # characters of a plain prompt's beginning that count
PROMPT_FIELDS = ("prompt", "input", "instructions", "system")


def affinity_key(body: Mapping[str, object]) -> str:
    """A key that all turns of a conversation share; empty where a request has no prompt.

    Of a conversation, everything up to the first message of the user counts, since that is what a later turn repeats
    and another conversation does not; of a plain prompt, its first characters or token ids. How the content of a
    message is written does not count: many clients send it as text first and as a list of parts later, or move a mark
    for a cache from one part to another.
    """
    beginning: list[object] = []
    messages = body.get("messages")
    if isinstance(messages, list) and messages:
        beginning = [_content(body.get("system")), *_first_turn(messages)]
    else:
        beginning = [_first_chunk(name, body[name]) for name in PROMPT_FIELDS if body.get(name)]
    if not beginning:
        return ""
    try:
        return hashlib.sha256(msgspec.json.encode([body.get("model"), beginning])).hexdigest()
    except RecursionError:  # no prompt is nested so deeply; the replica says so
        return ""


def _first_turn(messages: Sequence[object]) -> list[object]:
    """The messages up to the user's first."""
    for number, message in enumerate(messages):
        if isinstance(message, dict) and message.get("role") == "user":
            return [_said(each) for each in messages[: number + 1]]
    return [_said(each) for each in messages]


def _said(message: object) -> object:
    return [message.get("role"), _content(message.get("content"))] if isinstance(message, dict) else message


def _content(content: object) -> object:
    """The texts of a content, which is one text or a list of parts; a part without a text as it is."""
    parts = [content] if isinstance(content, str) else content
    if not isinstance(parts, list):
        return content
    return [part.get("text", part) if isinstance(part, dict) else part for part in parts]


def _first_chunk(name: str, value: object) -> object:
    """The first characters of a text, the first items of a list of ids, the first turn of a list of messages."""
    if name == "input" and isinstance(value, str):  # the Responses API's short form of one message
        value = [{"role": "user", "content": value}]
    if isinstance(value, list) and isinstance(value[0], dict):
        return _first_turn(value)
    if isinstance(value, list):
        return [each[:CHUNK] if isinstance(each, str | list) else each for each in value[:CHUNK]]
    return value[:CHUNK] if isinstance(value, str) else value


def preferred(key: str, names: Iterable[str]) -> list[str]:
    """The names in the order in which a key prefers them, the same in every process.

    Rendezvous hashing (Thaler and Ravishankar, 1998): a name that is added takes only the keys that now prefer it, and
    those of a name that goes away spread over the others.
    """
    return sorted(names, key=lambda name: hashlib.sha256(f"{key}/{name}".encode()).digest(), reverse=True)
