"""Ways to spoil a valid input: bytes of any format, numbers at known places, and the values of a JSON document."""

import json
from collections.abc import Callable, Sequence
from copy import deepcopy
from random import Random
from typing import Any

# Numbers at the edges of the types that counts, lengths and offsets are stored in, and products of two that overflow.
EXTREMES = (
    -(2**63), -(2**31), -2, -1, 0, 1, 2, 63, 64, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**16, 2**24, 2**31 - 1, 2**31,
    2**32 - 1, 2**32, 2**40, 2**60, 2**61, 2**63 - 1, 2**63, 2**64 - 8, 2**64 - 1,
)  # fmt: skip
DEEP = 100_000  # levels of nesting


class Raw(str):
    """Text that is put into a JSON document as it is."""


ABSURD: Sequence[Any] = (
    None, True, False, "", " ", "x", "0", "\0", "\x1b[2J", "two\nlines", "\ud800", "\u2028", "x" * 100_000, "../x", "/",
    [], {}, [[]], [None], [0] * 70_000, {"": {}}, {"x": None}, 0.5, -0.5, 1e-320, 1e308,
    Raw("NaN"), Raw("Infinity"), Raw("-Infinity"), Raw("1e999"), Raw("9" * 5000), Raw("-" + "9" * 5000),
    Raw("[" * DEEP), Raw("[" * 900 + "]" * 900), Raw("[" * DEEP + "]" * DEEP), Raw('{"x":' * 500 + "0" + "}" * 500),
    *EXTREMES,
)  # fmt: skip


def spoil_bytes(draw: Random, data: bytes, fields: Sequence[tuple[int, int]] = ()) -> bytes:
    """One to three changes; `fields` are the places and sizes of little-endian numbers that mean something."""
    result = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        if not result:
            break
        if fields and draw.random() < 0.6:
            at, size = draw.choice(fields)
            near = int.from_bytes(result[at : at + size], "little") + draw.choice((-1, 1, 2, 64))
            set_number(result, at, size, near if draw.random() < 0.2 else draw.choice(EXTREMES))
        else:
            draw.choice(BYTE_CHANGES)(draw, result)
    return bytes(result)


def set_number(data: bytearray, at: int, size: int, number: int) -> None:
    """Put a little-endian number in its place."""
    data[at : at + size] = (number % 2 ** (8 * size)).to_bytes(size, "little")


def _flip(draw: Random, data: bytearray) -> None:
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)


def _overwrite(draw: Random, data: bytearray) -> None:
    at = draw.randrange(len(data))
    size = min(draw.choice((1, 4, 8, 64)), len(data) - at)
    data[at : at + size] = bytes([draw.choice((0, 0xFF, 0x80, draw.randrange(256)))]) * size


def _number(draw: Random, data: bytearray) -> None:
    size = draw.choice((1, 2, 4, 8))
    if len(data) > size:
        set_number(data, draw.randrange(len(data) - size), size, draw.choice(EXTREMES))


def _cut(draw: Random, data: bytearray) -> None:
    del data[draw.randrange(len(data)) :]


def _remove(draw: Random, data: bytearray) -> None:
    at = draw.randrange(len(data))
    del data[at : at + draw.choice((1, 2, 8, 100))]


def _repeat(draw: Random, data: bytearray) -> None:
    start, at = draw.randrange(len(data)), draw.randrange(len(data))
    data[at:at] = data[start : start + draw.choice((1, 8, 64, 1000))]


def _insert(draw: Random, data: bytearray) -> None:
    at = draw.randrange(len(data))
    data[at:at] = draw.choice((b"\0", b"\xff", b"\xed\xa0\x80", b"\n", b'"', b"\\ud800", draw.randbytes(16)))


BYTE_CHANGES: Sequence[Callable[[Random, bytearray], None]] = (
    _flip, _flip, _overwrite, _number, _cut, _remove, _repeat, _insert
)  # fmt: skip


def dumps(value: Any) -> str:
    """A JSON document; `Raw` parts of it may make it an invalid one."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(key)}:{dumps(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(dumps, value)) + "]"
    return json.dumps(value)


def spoil_json(draw: Random, data: bytes, absurd: Sequence[Any] = ABSURD) -> bytes:
    """Change one to three values, keys or lists of a JSON document, or in some cases its bytes."""
    if draw.random() < 0.1:
        return spoil_bytes(draw, data)
    holder = [json.loads(data)]
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        parent, key = draw.choice(list(_slots(holder)))
        draw.choice(JSON_CHANGES)(draw, parent, key, absurd)
    return dumps(holder[0]).encode()


def _slots(value: Any, most: int = 50) -> Any:
    """(list or mapping, index or key) of the values in a document; of a long list only the first ones."""
    items = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
    for key, item in items[:most]:
        yield value, key
        if isinstance(item, dict | list):
            yield from _slots(item, most)


def _replace(draw: Random, parent: Any, key: Any, absurd: Sequence[Any]) -> None:
    parent[key] = deepcopy(draw.choice(absurd))


def _nudge(draw: Random, parent: Any, key: Any, absurd: Sequence[Any]) -> None:
    value = parent[key]
    if isinstance(value, int | float) and not isinstance(value, bool):
        parent[key] = draw.choice((value + 1, value - 1, -value, value * 2, float(value), str(value)))
    elif isinstance(value, str) and not isinstance(value, Raw):
        parent[key] = draw.choice((value + "x", value[1:], value.upper(), value * 2, value + "\n", [value]))
    else:
        parent[key] = draw.choice(([value, value], {"x": value}, str(value)))


def _delete(draw: Random, parent: Any, key: Any, absurd: Sequence[Any]) -> None:
    if len(parent) > 1:
        del parent[key]


def _add(draw: Random, parent: Any, key: Any, absurd: Sequence[Any]) -> None:
    if isinstance(parent, dict):
        parent[draw.choice((f"{key}x", "x", "", "\ud800", "\x1b[2J", "x" * 10_000))] = deepcopy(draw.choice(absurd))
    else:
        parent.insert(key, deepcopy(draw.choice((parent[key], draw.choice(absurd)))))


def _say_twice(draw: Random, parent: Any, key: Any, absurd: Sequence[Any]) -> None:
    value = parent[key]
    if isinstance(value, dict) and value:
        again = json.dumps(draw.choice(list(value)))
        parent[key] = Raw(dumps(value)[:-1] + f",{again}:{dumps(draw.choice(absurd))}}}")
    elif isinstance(parent, list):
        parent += parent[: 1000 // len(parent)]


JSON_CHANGES: Sequence[Callable[[Random, Any, Any, Sequence[Any]], None]] = (
    _replace, _replace, _replace, _replace, _nudge, _nudge, _delete, _add, _say_twice
)  # fmt: skip
