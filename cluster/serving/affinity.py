"""Which replica has probably seen the beginning of a prompt before."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import msgspec

CHUNK = 1024  # characters of a plain prompt's beginning that count
PROMPT_FIELDS = ("prompt", "input", "instructions", "system")


def affinity_key(body: Mapping[str, object]) -> str:
    """A key that all turns of a conversation share; empty where a request has no prompt.

    Of a conversation, everything up to the first message of the user counts, since that is what a later turn repeats
    and another conversation does not; of a plain prompt, its first characters or token ids.
    """
    beginning: list[object] = []
    messages = body.get("messages")
    if isinstance(messages, list) and messages:
        beginning = [body.get("system"), *_first_turn(messages)]
    else:
        beginning = [_first_chunk(body[name]) for name in PROMPT_FIELDS if body.get(name)]
    if not beginning:
        return ""
    return hashlib.sha256(msgspec.json.encode([body.get("model"), beginning])).hexdigest()


def _first_turn(messages: Sequence[object]) -> list[object]:
    """The messages up to the user's first."""
    for number, message in enumerate(messages):
        if isinstance(message, dict) and message.get("role") == "user":
            return [_said(each) for each in messages[: number + 1]]
    return [_said(each) for each in messages]


def _said(message: object) -> object:
    return [message.get("role"), message.get("content")] if isinstance(message, dict) else message


def _first_chunk(value: object) -> object:
    """The first characters of a text, the first items of a list of ids, the first turn of a list of messages."""
    if isinstance(value, list):
        return (
            _first_turn(value)
            if value and isinstance(value[0], dict)
            else [_first_chunk(each) for each in value[:CHUNK]]
        )
    return value[:CHUNK] if isinstance(value, str) else value


def preferred(key: str, names: Iterable[str]) -> list[str]:
    """The names in the order in which a key prefers them, the same in every process.

    Rendezvous hashing (Thaler and Ravishankar, 1998): a name that is added takes only the keys that now prefer it, and
    those of a name that goes away spread over the others.
    """
    return sorted(names, key=lambda name: hashlib.sha256(f"{key}/{name}".encode()).digest(), reverse=True)
