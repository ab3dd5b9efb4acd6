"""Jinja's sandbox with limits on time and memory, since a chat template comes with a checkpoint and is not trusted.

The sandbox keeps a template from reaching Python. The limits here keep it from going on for ever or filling memory:
every operation whose result may be much larger than its operands is checked before it runs, loops and calls are
counted, and a deadline is looked at each time. So a template may only do many small things, and not for long.
"""

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.exceptions import TemplateRuntimeError
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

TEXT_LIMIT = 2**24  # characters of a text
ITEM_LIMIT = 2**18  # items of a list or a mapping
NUMBER_LIMIT = 10**5  # of a width, a count or an indentation
BITS_LIMIT = 4096  # of a whole number
STEP_LIMIT = 2**18  # turns of loops, calls and other operations in one rendering
SECONDS = 10.0  # for one rendering; a real template takes milliseconds
SOURCE_LIMIT = 2**20  # characters of a template
COUNTED, JOINED, WEIGHED = "counted ", "joined ", "weighed "  # filters that no template can name: no name has a space
REMOVED_GLOBALS, REMOVED_FILTERS = ("lipsum",), ("urlize",)
DIGITS = re.compile(r"[0-9]+")


class LimitError(TemplateRuntimeError):
    """A template goes beyond a limit."""


class _Budget:
    """What is left of one rendering, and how large the lists and mappings in it would be as text."""

    def __init__(self) -> None:
        self._steps = STEP_LIMIT
        self._deadline = time.monotonic() + SECONDS
        self._weighed: dict[int, tuple[object, int]] = {}  # by identity; each is kept, so that none takes its place

    def weigh(self, value: object) -> int:
        """Characters and items of a value, where whatever occurs twice counts twice.

        A list that holds another one twice, which holds a third one twice and so on, takes little memory, but Python
        takes for ever to write or compare it.
        """
        if isinstance(value, str | bytes):
            return len(value)
        if not isinstance(value, list | tuple | dict):
            return 1
        if id(value) not in self._weighed:
            parts = [*value.keys(), *value.values()] if isinstance(value, dict) else value
            self._weighed[id(value)] = (value, sum(map(self.weigh, parts)) + len(parts))
        return self._weighed[id(value)][1]

    def spend(self) -> None:
        self._steps -= 1
        if self._steps < 0:
            raise LimitError(f"it takes more than {STEP_LIMIT} steps")
        if time.monotonic() > self._deadline:
            raise LimitError(f"it takes longer than {SECONDS:g} seconds")


_budget: ContextVar[_Budget] = ContextVar("budget")


@contextmanager
def limited() -> Iterator[None]:
    """Give whatever a template of a `LimitedEnvironment` does inside this block one budget."""
    token = _budget.set(_Budget())
    try:
        yield
    finally:
        _budget.reset(token)


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox with limits; a template must be compiled and rendered inside `limited()`."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, **options: Any) -> None:  # noqa: ANN401 (Jinja's own options)
        # Jinja would compute what is constant while it compiles a template, without a context and so out of our sight.
        super().__init__(optimized=False, finalize=_finalized, **options)
        for name in REMOVED_GLOBALS:
            del self.globals[name]
        for name in REMOVED_FILTERS:
            del self.filters[name]

    def finish(self) -> "LimitedEnvironment":
        """Put limits on every filter and global function; call it once, when all are there."""
        bounded = {name: _bounded(name, function) for name, function in dict(self.filters).items()}
        self.filters: dict[str, Callable[..., Any]] = bounded | {COUNTED: _counted, JOINED: _joined, WEIGHED: _weighed}
        return self

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        if len(source) > SOURCE_LIMIT:
            raise LimitError(f"it has {len(source)} characters, expected at most {SOURCE_LIMIT}")
        parsed: nodes.Template = _Limiter().visit(super()._parse(source, name, filename))
        return parsed

    def call(self, context: Context, function: Any, *args: Any, **options: Any) -> Any:  # noqa: ANN401
        """Call a function, a method or a macro, if its arguments are small enough."""
        _spend()
        _check_method(function, args, options)
        return _checked(super().call(context, function, *args, **options))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:  # noqa: ANN401
        """Compute an operation whose result may be large, if it is not."""
        _spend()
        CHECKS[operator](left, right)
        return super().call_binop(context, operator, left, right)

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        """Join what a template, or a part of one, has written."""
        return _join(parts)


class _Limiter(NodeTransformer):
    """Sends loops, `~` and new lists, which the sandbox does not intercept, through filters of ours."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = _filtered(node.iter, COUNTED)
        return node

    def visit_List(self, node: nodes.List) -> nodes.Filter:
        self.generic_visit(node)
        return _filtered(node, WEIGHED)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Filter:
        self.generic_visit(node)
        return _filtered(node, WEIGHED)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:
        self.generic_visit(node)
        return _filtered(node, WEIGHED) if node.ctx == "load" else node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), JOINED)


def _filtered(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _spend() -> None:
    _budget.get().spend()


@pass_context  # type: ignore[untyped-decorator]
def _finalized(_context: Context, value: object) -> object:
    _spend()
    return value


def _counted(items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        _spend()
        yield item


def _joined(parts: Iterable[Any]) -> str:
    return _join(map(str, parts))


def _weighed(value: Any) -> Any:  # noqa: ANN401
    _check_length(_budget.get().weigh(value))
    return value


def _join(parts: Iterable[str]) -> str:
    kept, length = [], 0
    for part in parts:
        length += len(part)
        _check_length(length)
        kept.append(part)
    return "".join(kept)


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter whose arguments and result are small enough."""
    passed = int(hasattr(function, "jinja_pass_arg"))  # a context or an environment comes first

    @wraps(function)  # keeps the mark by which Jinja passes it
    def bounded(*args: Any, **options: Any) -> Any:  # noqa: ANN401
        _spend()
        value, *others = args[passed:]
        _check_filter(name, value, others, options)
        return _checked(function(*args, **options))

    return bounded


def _check_method(function: Any, args: tuple[Any, ...], options: Mapping[str, Any]) -> None:  # noqa: ANN401
    """Refuse arguments from which a function or a method of a text could make something large."""
    name = getattr(function, "__name__", "")
    text = getattr(getattr(function, "__wrapped__", function), "__self__", None)  # the sandbox wraps some methods
    if not isinstance(function, Macro):
        _check_counts([*args, *options.values()])
    if isinstance(text, str) and name in ("format", "format_map"):
        _check_format(text, [*args, options])
    elif isinstance(text, str) and name == "replace" and len(args) > 1:
        _check_replacement(text, args)
    elif isinstance(text, str) and name == "join" and args:
        _check_joined(_items(args[0]), text)


def _check_filter(name: str, value: object, args: Sequence[Any], options: Mapping[str, Any]) -> None:
    """Refuse arguments from which a filter, by its name in a template, could make something large of `value`."""
    if name not in ("d", "default"):
        _check_counts([*args, *options.values()])
    if name == "format":
        _check_format(str(value), [*args, options])
    elif name == "replace" and len(args) > 1:
        _check_replacement(str(value), args)
    elif name == "join":
        _check_joined(_items(value), str(options.get("d", args[0] if args else "")))


def _check_counts(values: Iterable[object]) -> None:
    for value in values:
        if isinstance(value, int) and abs(value) > NUMBER_LIMIT:
            raise LimitError(f"it asks for {_short(value)} of something, expected at most {NUMBER_LIMIT}")


def _check_replacement(text: str, args: Sequence[Any]) -> None:
    old, new = str(args[0]), str(args[1])
    _check_length(len(text) + text.count(old) * len(new))


def _check_joined(items: Iterable[Any], separator: str) -> None:
    _check_length(sum(len(str(item)) + len(separator) for item in items))


def _items(value: object) -> Iterable[Any]:
    """The items of something that can be looked at without using it up."""
    return value if isinstance(value, list | tuple | str | dict) else ()


def _check_format(pattern: str, values: Iterable[object]) -> None:
    widths = [int(digits[:9]) for digits in DIGITS.findall(pattern)]
    if max(widths, default=0) > NUMBER_LIMIT or "*" in pattern:
        raise LimitError(f"it formats a text with a width above {NUMBER_LIMIT}")
    longest = max(map(_budget.get().weigh, values), default=0)
    _check_length(len(pattern) + (pattern.count("{") + pattern.count("%")) * (longest + max(widths, default=0)))


def _check_sum(left: object, right: object) -> None:
    if isinstance(left, Sized) and isinstance(right, Sized):
        _check_items(left, len(left) + len(right))
        _check_length(_budget.get().weigh(left) + _budget.get().weigh(right))


def _check_product(left: object, right: object) -> None:
    for items, count in ((left, right), (right, left)):
        if isinstance(items, Sized) and isinstance(count, int):
            _check_items(items, len(items) * max(count, 0))
            _check_length(_budget.get().weigh(items) * max(count, 0))
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() + right.bit_length())


def _check_power(left: object, right: object) -> None:
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() * max(right, 0))


def _check_remainder(left: object, right: object) -> None:
    if isinstance(left, str):
        _check_format(left, right if isinstance(right, tuple) else (right,))


CHECKS: Mapping[str, Callable[[object, object], None]] = {
    "+": _check_sum,
    "*": _check_product,
    "**": _check_power,
    "%": _check_remainder,
}


def _check_bits(bits: int) -> None:
    if bits > BITS_LIMIT:
        raise LimitError(f"it computes a whole number of {_short(bits)} bits, expected at most {BITS_LIMIT}")


def _check_length(length: int) -> None:
    if length > TEXT_LIMIT:
        raise LimitError(f"it makes a text of {_short(length)} characters, expected at most {TEXT_LIMIT}")


def _check_items(value: object, count: int) -> None:
    if not isinstance(value, str | bytes) and count > ITEM_LIMIT:
        raise LimitError(f"it makes a list of {_short(count)} items, expected at most {ITEM_LIMIT}")


def _checked(result: Any) -> Any:  # noqa: ANN401
    if isinstance(result, str | bytes):
        _check_length(len(result))
    elif isinstance(result, list | tuple | dict):
        _check_items(result, len(result))
        return _weighed(result)
    return result


def _short(number: int) -> str:
    """A number that may have more digits than Python writes."""
    return str(number) if number.bit_length() < 100 else f"2**{number.bit_length() - 1} or more"
