"""How large the results of what a chat template does may become, from its operands alone, before anything is computed.

Each rule gives the characters of a text, or the items of a list, at most. Whatever has no rule gives a result that is
not much larger than its operands.
"""

import re
from collections.abc import Callable, ItemsView, Iterable, KeysView, Mapping, Sized, ValuesView

from jinja2.exceptions import TemplateRuntimeError
from jinja2.utils import Namespace

TEXT_LIMIT = 2**23  # characters of a text; a tokenizer takes no longer one either
ITEM_LIMIT = 2**16  # items of a list or a mapping
BITS_LIMIT = 4096  # of a whole number
DIGITS_LIMIT = 1000  # to which a number may be rounded
INDENT_LIMIT = 16  # characters for each level of JSON, and of a separator in it
# A field of a `%` pattern, with its width and its precision.
FIELD = re.compile(r"%(?:\([^)]*\))?[-#0 +]*(\*|[0-9]*)(?:\.(\*|[0-9]*))?[a-zA-Z%]")
NESTED, WIDTHS = re.compile(r"\{[^{}]*\{"), re.compile(r"\{[^{}]*:([^{}]*)\}")  # fields of `str.format`


class LimitError(TemplateRuntimeError):
    """A template goes beyond a limit."""


def weigh(value: object) -> int:
    """Characters and items of a value, where whatever occurs twice counts twice.

    A list that holds another one twice, which holds a third one twice and so on, takes little memory, but Python takes
    for ever to write or compare it. The work here grows only with what there is in memory.
    """
    known: dict[int, int] = {}

    def of(item: object) -> int:
        if isinstance(item, str | bytes):
            return len(item)
        parts = _parts(item)
        if parts is None:
            return 1
        if id(item) not in known:
            known[id(item)] = 1  # for whatever holds itself, which Python writes as ...
            known[id(item)] = sum(map(of, parts)) + len(parts)
        return known[id(item)]

    return of(value)


def _parts(value: object) -> list[object] | tuple[object, ...] | None:
    """What a container holds; None for anything else."""
    if isinstance(value, Namespace):
        value = object.__getattribute__(value, "_Namespace__attrs")
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    if isinstance(value, KeysView | ValuesView | ItemsView):
        return list(value)
    return value if isinstance(value, list | tuple) else None


def check_text(length: int) -> None:
    """Raise `LimitError` for a text of so many characters."""
    if length > TEXT_LIMIT:
        raise LimitError(f"it makes a text of {_short(length)} characters, expected at most {TEXT_LIMIT}")


def check_items(count: int) -> None:
    """Raise `LimitError` for a list of so many items."""
    if count > ITEM_LIMIT:
        raise LimitError(f"it makes a list of {_short(count)} items, expected at most {ITEM_LIMIT}")


def check_value(value: object) -> None:
    """Raise `LimitError` for a value that is too large, or would be as text."""
    if isinstance(value, bytes | bytearray):
        raise LimitError("it makes bytes, expected texts alone")
    if isinstance(value, list | tuple | dict):
        check_items(len(value))
    if not isinstance(value, str):
        check_text(weigh(value))
    else:
        check_text(len(value))


# The results of operators


def check_operation(operator: str, left: object, right: object) -> None:
    """Raise `LimitError` for an operation whose result would be too large."""
    if operator == "%" and isinstance(left, str):
        check_text(percent_length(left, right if isinstance(right, tuple) else (right,)))
    elif operator == "+" and isinstance(left, Sized) and isinstance(right, Sized):
        _check_together(left, len(left) + len(right), weigh(left) + weigh(right))
    elif operator == "*" and isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() + right.bit_length())
    elif operator == "*":
        for items, count in ((left, right), (right, left)):
            if isinstance(items, Sized) and isinstance(count, int):
                _check_together(items, len(items) * max(count, 0), weigh(items) * max(count, 0))
    elif operator == "**" and isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() * max(right, 0))


def _check_together(operand: object, count: int, weight: int) -> None:
    if not isinstance(operand, str):
        check_items(count)
    check_text(weight)


def _check_bits(bits: int) -> None:
    if bits > BITS_LIMIT:
        raise LimitError(f"it computes a whole number of {_short(bits)} bits, expected at most {BITS_LIMIT}")


# The results of filters and of methods: each rule has the parameters of what it is about


def percent_length(pattern: str, values: Iterable[object]) -> int:
    """Of `pattern % values`."""
    fields = [field.groups("") for field in FIELD.finditer(pattern)]
    if any("*" in field for field in fields):
        raise LimitError("it formats a text with a width that is an argument, expected a number in the pattern")
    widths = sum(_number(part) for field in fields for part in field)
    return len(pattern) + widths + len(fields) * max(map(weigh, values), default=0)


def braces_length(pattern: str, *values: object, **named: object) -> int:
    """Of `pattern.format(*values, **named)`."""
    if NESTED.search(pattern):
        raise LimitError("it formats a text with a width that is an argument, expected a number in the pattern")
    widths = sum(_number(digits) for spec in WIDTHS.findall(pattern) for digits in re.findall("[0-9]+", spec))
    return len(pattern) + widths + pattern.count("{") * max(map(weigh, (*values, *named.values())), default=0)


def _number(digits: str) -> int:
    return int(digits[:12] or 0)


def _percent_filter(value: object, *values: object, **named: object) -> int:
    return percent_length(str(value), (*values, *named.values()))


def _mapped(pattern: str, mapping: object) -> int:
    return braces_length(pattern, mapping)


def _padded(text: object, width: int = 80, *_fill: object) -> int:
    return weigh(text) + abs(width)


def _replaced(text: object, old: object, new: object, *_count: object, **_named: object) -> int:
    return weigh(text) + str(text).count(str(old)) * len(str(new))


def _tabs(text: str, tabsize: int = 8) -> int:
    return len(text) + text.count("\t") * abs(tabsize)


def _indented(text: object, width: int | str = 4, *_where: object, **_named: object) -> int:
    indent = len(width) if isinstance(width, str) else abs(width)
    return weigh(text) + (str(text).count("\n") + 1) * indent


def _wrapped(
    text: str, width: int = 79, _break: object = True, wrapstring: str | None = None, *_rest: object, **_named: object
) -> int:
    return len(text) + (len(text) // max(width, 1) + text.count("\n") + 1) * len(wrapstring or "\n")


def _json(
    value: object, _ascii: object = False, indent: int | str | None = None, separators: object = None, **_named: object
) -> int:
    spaces = len(indent) if isinstance(indent, str) else indent or 0
    if spaces > INDENT_LIMIT or any(len(str(part)) > INDENT_LIMIT for part in separators or ()):  # type: ignore[attr-defined]
        raise LimitError(f"it indents JSON by more than {INDENT_LIMIT} characters")
    return weigh(value)


def _counted(value: object, count: int = 0, *_fill: object, **_named: object) -> int:
    check_items(abs(count))
    return weigh(value)


def _rounded(_value: object, precision: int = 0, *_method: object, **_named: object) -> int:
    if abs(precision) > DIGITS_LIMIT:
        raise LimitError(f"it rounds to {_short(precision)} digits, expected at most {DIGITS_LIMIT}")
    return 1


def _summed(_value: object, _attribute: object = None, start: object = 0) -> int:
    if not isinstance(start, int | float):
        raise LimitError("it sums up something that is no number")
    return 1


FILTERS: Mapping[str, Callable[..., int]] = {
    "batch": _counted,
    "center": _padded,
    "format": _percent_filter,
    "indent": _indented,
    "replace": _replaced,
    "round": _rounded,
    "slice": _counted,
    "sum": _summed,
    "tojson": _json,
    "wordwrap": _wrapped,
}
METHODS: Mapping[str, Callable[..., int]] = {  # of texts
    "center": _padded,
    "expandtabs": _tabs,
    "format": braces_length,
    "format_map": _mapped,
    "ljust": _padded,
    "replace": _replaced,
    "rjust": _padded,
    "zfill": _padded,
}
JOINING = "join"  # a filter and a method whose items are counted while they are taken
FORBIDDEN = ("encode", "from_bytes", "to_bytes", "translate")  # methods that make bytes, or anything of a character


def _short(number: int) -> str:
    """A number that may have more digits than Python writes."""
    return str(number) if number.bit_length() < 100 else f"2**{number.bit_length() - 1} or more"
