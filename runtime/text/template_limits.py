"""Jinja's sandbox with limits on time and memory, since a chat template comes with a checkpoint and is not trusted.

The sandbox keeps a template from reaching Python. The limits here keep it from going on for ever or filling memory:
every operation whose result may be much larger than its operands is checked before it runs
(`runtime.text.template_sizes`), loops and calls are counted, and so are the characters of all texts that are made. A
deadline is looked at now and then. So a template may only do many small things, and not for long.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from runtime.text.template_sizes import (
    FILTERS,
    FORBIDDEN,
    JOINING,
    METHODS,
    LimitError,
    check_items,
    check_operation,
    check_text,
    check_value,
    weigh,
)

STEP_LIMIT = 2**19  # turns of loops, operations and, four times as dear, calls in one rendering
CALL_STEPS = 4
STEPS_AT_ONCE = 2**8  # after which the deadline is looked at
SECONDS = 10.0  # for one rendering; a real template takes milliseconds
CHARACTER_LIMIT = 2**27  # of all texts that one rendering makes
SOURCE_LIMIT = 2**16  # characters of a template; long ones have 20,000
COUNTED, JOINED, WEIGHED = "counted ", "joined ", "weighed "  # filters that no template can name: no name has a space
JINJA_OPTIONS = frozenset(("_loop_vars", "_block_vars"))  # that Jinja adds to a call inside a loop or a block
REMOVED_GLOBALS, REMOVED_FILTERS = ("lipsum",), ("pprint", "urlize")


class _Budget:
    """What is left of one rendering."""

    def __init__(self) -> None:
        self._steps = STEP_LIMIT
        self._characters = CHARACTER_LIMIT
        self._deadline = time.monotonic() + SECONDS

    def spend(self, steps: int = 1) -> None:
        """Count steps."""
        before, self._steps = self._steps, self._steps - steps
        if self._steps < 0:
            raise LimitError(f"it takes more than {STEP_LIMIT} steps")
        if before // STEPS_AT_ONCE > self._steps // STEPS_AT_ONCE and time.monotonic() > self._deadline:
            raise LimitError(f"it takes longer than {SECONDS:g} seconds")

    def made(self, characters: int) -> None:
        """Count a text of so many characters."""
        check_text(characters)
        self._characters -= characters
        if self._characters < 0:
            raise LimitError(f"it makes texts of more than {CHARACTER_LIMIT} characters in all")


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
        """Put limits on every filter; call it once, when all are there."""
        bounded = {name: _bounded(name, function) for name, function in dict(self.filters).items()}
        self.filters: dict[str, Callable[..., Any]] = bounded | {COUNTED: _counted, JOINED: _join, WEIGHED: _checked}
        return self

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        if len(source) > SOURCE_LIMIT:
            raise LimitError(f"it has {len(source)} characters, expected at most {SOURCE_LIMIT}")
        parsed: nodes.Template = _Limiter().visit(super()._parse(source, name, filename))
        return parsed

    def call(self, context: Context, function: Any, *args: Any, **options: Any) -> Any:  # noqa: ANN401
        """Call a function, a method or a macro, if its result is small enough."""
        _budget.get().spend(CALL_STEPS)
        name = getattr(function, "__name__", "")
        text = getattr(getattr(function, "__wrapped__", function), "__self__", None)  # the sandbox wraps some methods
        if name in FORBIDDEN:
            raise LimitError(f"it calls {name}, which no chat template needs")
        if isinstance(text, str) and name == JOINING and args:
            return _join(args[0], text)
        if isinstance(text, str) and name in METHODS:
            _apply(METHODS[name], text, *args, **{key: options[key] for key in options.keys() - JINJA_OPTIONS})
        return _checked(super().call(context, function, *args, **options))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:  # noqa: ANN401
        """Compute an operation whose result may be large, if it is not."""
        _budget.get().spend()
        check_operation(operator, left, right)
        return _checked(super().call_binop(context, operator, left, right))

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        """Join what a template, or a part of one, has written."""
        return _join(parts)


class _Limiter(NodeTransformer):
    """Sends loops, `~`, slices and new lists, which the sandbox does not intercept, through filters of ours."""

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

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
        self.generic_visit(node)
        return _filtered(node, WEIGHED) if isinstance(node.arg, nodes.Slice) else node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), JOINED)


def _filtered(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


@pass_context  # type: ignore[untyped-decorator]
def _finalized(_context: Context, value: object) -> object:
    """What is written, which becomes text now."""
    _budget.get().spend()
    if not isinstance(value, str):
        check_text(weigh(value))
    return value


def _counted(items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        _budget.get().spend()
        yield item


def _join(parts: Iterable[Any], separator: str = "") -> str:
    """Join parts, each of which is taken only if there is room for it."""
    kept: list[str] = []
    length = 0
    for part in parts:
        if not isinstance(part, str):
            check_text(weigh(part))
        kept.append(str(part))
        length += len(kept[-1]) + len(separator)
        check_items(len(kept))
        check_text(length)
    _budget.get().made(length)
    return separator.join(kept)


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter whose arguments and result are small enough."""
    passed = int(hasattr(function, "jinja_pass_arg"))  # a context or an environment comes first

    @wraps(function)  # keeps the mark by which Jinja passes it
    def bounded(*args: Any, **options: Any) -> Any:  # noqa: ANN401
        _budget.get().spend()
        value, *others = args[passed:]
        if name == JOINING:
            others, options = [_separator(others, options), *others[1:]], {**options}
            options.pop("d", None)
            items = list(_counted(value))
            check_text(sum(weigh(item) + len(others[0]) for item in items))
            return _checked(function(*args[:passed], items, *others, **options))
        if not isinstance(value, str):
            check_text(weigh(value))
        if name in FILTERS:
            _apply(FILTERS[name], value, *others, **options)
        return _checked(function(*args, **options))

    return bounded


def _separator(args: list[Any], options: dict[str, Any]) -> str:
    return str(options.get("d", args[0] if args else ""))


def _apply(rule: Callable[..., int], *args: Any, **options: Any) -> None:  # noqa: ANN401
    """Refuse a result that is too large by its rule, and arguments that the rule does not know."""
    try:
        length = rule(*args, **options)
    except (TypeError, ValueError, AttributeError) as error:
        raise LimitError(f"it gives arguments that do not fit: {error}") from error
    check_text(length)


def _checked(result: Any) -> Any:  # noqa: ANN401
    check_value(result)
    if isinstance(result, str):
        _budget.get().made(len(result))
    return result
