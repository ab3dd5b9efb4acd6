"""Spares TVM's script parser what it does again for every kernel, expression and use of an inline function.

Our kernels consist of inline functions, and a compile parses dozens of them: without this, that takes several times as
long. What a kernel is parsed into, and the errors found in it, stay the same.
"""

import ast
import inspect
from collections.abc import Mapping
from functools import cache
from types import CodeType, SimpleNamespace
from typing import Any

from tvm.script.parser.core import doc, entry, evaluator
from tvm.script.parser.core.diagnostics import Source
from tvm.script.parser.core.parser import ScriptMacro
from tvm.tirx.script.parser import entry as kernel_entry

_evaluated_by_python = evaluator._eval_expr


def speed_up() -> None:
    """Put the functions of this module in the place of TVM's.

    TVM also reads a source line of every function on the stack, to see whether a kernel is part of a class. None of
    ours is.
    """
    kernel_entry.inspect = SimpleNamespace(**vars(inspect) | {"stack": list})
    entry.Source = _source
    ScriptMacro._find_parser_def = _parser_of_caller
    Source.as_ast = _tree
    evaluator._eval_expr = _evaluated


def _parser_of_caller(_: ScriptMacro) -> Any:  # noqa: ANN401 (TVM's parser)
    """Find the parser that an inline function is called from: it is in the globals of a frame on the stack.

    TVM's own search first reads the source line of every frame.
    """
    frame = inspect.currentframe()
    while frame is not None:
        parser = frame.f_globals.get(ScriptMacro.parser_object_name)
        if parser is not None:
            return parser
        frame = frame.f_back
    raise RuntimeError("an inline function of TVMScript was called outside a kernel")


def _source(program: Any) -> Source:  # noqa: ANN401 (a function, or TVMScript as text)
    """The source of a kernel or inline function; TVM reads its file at every definition."""
    return _kept_source(program.__code__) if inspect.isfunction(program) else Source(program)


@cache
def _kept_source(code: CodeType) -> Source:
    return Source(code)


def _tree(source: Source) -> Any:  # noqa: ANN401 (TVM's form of a syntax tree)
    """The syntax tree of a kernel or inline function; TVM makes it at every call, and twice for a kernel."""
    kept = _kept_tree(source.source)
    return doc.parse(source.source) if kept is None else kept


@cache
def _kept_tree(text: str) -> Any:  # noqa: ANN401
    """The tree of a text; None for one with functions inside, whose trees TVM's parser changes."""
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    return doc.parse(text) if len(functions) == 1 else None


def _evaluated(node: Any, names: Mapping[str, Any]) -> Any:  # noqa: ANN401 (any value of a kernel's code)
    """The value of an expression, whose operands TVM has evaluated and named before.

    TVM leaves every one to Python's compiler. Names, constants and attributes, which are most, do not need it. A call
    does: `_parser_of_caller` finds the parser among the globals that the call is evaluated with.
    """
    kind = type(node)
    if kind is doc.Name and node.id in names:
        return names[node.id]
    if kind is doc.Constant:
        return node.value
    if kind is doc.Attribute:
        return getattr(_evaluated(node.value, names), node.attr)
    return _evaluated_by_python(node, names)
