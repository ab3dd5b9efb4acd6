"""Readers of a Relax dataflow function, backwards: which call made a value, and is it the call that a rule expects?"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from build.compiler import relax, tvm

END = np.iinfo(np.int64).max  # what ONNX writes for "to the end" of a slice
Expr = Any  # TVM's expressions have no useful static types


class NoMatch(Exception):
    """A rule's reason for answering "not mine"."""


@dataclass(frozen=True)
class Dataflow:
    """Bindings of one function by variable, with readers that raise `NoMatch` if an expression is not as expected."""

    calls: dict[Expr, Expr]
    uses: Counter[Expr]  # how many calls read each value

    @classmethod
    def of(cls, function: relax.Function) -> "Dataflow":
        """Index a function that consists of dataflow blocks."""
        bindings = [binding for block in function.body.blocks for binding in block.bindings]
        uses = Counter(variable for binding in bindings for variable in set(variables(binding.value)))
        return cls({binding.var: binding.value for binding in bindings}, uses)

    def args(self, value: Expr, op: str) -> Sequence[Expr]:
        """Arguments of the call to `relax.{op}` that made `value`."""
        call = self.calls.get(value)
        if not is_call(call, op):
            raise NoMatch(f"expected {op}, found {describe(call if call is not None else value)}")
        return call.args  # type: ignore[union-attr]

    def sliced(self, value: Expr, axis: int, begin: int, end: int) -> Expr:
        """The source of `source[..., begin:end, ...]` along `axis`; any `end` beyond the axis means its length."""
        source, axes, begins, ends, strides = self.args(value, "strided_slice")
        length = shape(source)[axis]
        found = tuple(integer(part.fields[0]) for part in (axes, begins, ends, strides))
        first = found[1] + length if found[1] < 0 else found[1]
        if (found[0], first, min(found[2], length), found[3]) != (axis, begin, min(end, length), 1):
            raise NoMatch(
                f"expected slice {begin}:{end} of axis {axis}, found {found[1]}:{found[2]} of axis {found[0]}"
            )
        return source

    def concatenated(self, value: Expr, axis: int) -> Sequence[Expr]:
        """The parts that were joined along `axis`."""
        (parts,) = self.args(value, "concat")
        found = self.calls[value].attrs.axis % len(shape(value))
        if found != axis:
            raise NoMatch(f"expected concat along axis {axis}, found axis {found}")
        return parts.fields

    def permuted(self, value: Expr, axes: tuple[int, ...]) -> Expr:
        """The source of a transposition by `axes`."""
        (source,) = self.args(value, "permute_dims")
        found = tuple(int(axis) for axis in self.calls[value].attrs.axes)
        if found != axes:
            raise NoMatch(f"expected axes {axes}, found {found}")
        return source

    def tuple_item(self, value: Expr) -> tuple[Expr, int]:
        """The tuple that `value` is an item of, and the item's index."""
        item = self.calls.get(value)
        if not isinstance(item, relax.TupleGetItem):
            raise NoMatch(f"expected an item of a tuple, found {describe(item if item is not None else value)}")
        return item.tuple_value, int(item.index)

    def through(self, value: Expr, op: str) -> Expr:
        """The source of `value` if a call to `op` made it, otherwise `value` itself."""
        return self.calls[value].args[0] if is_call(self.calls.get(value), op) else value


def variables(expression: Expr) -> Iterable[Expr]:
    """Yield the variables that an expression reads."""
    if isinstance(expression, relax.Var):
        yield expression
    for child in getattr(expression, "args", None) or getattr(expression, "fields", None) or ():
        yield from variables(child)


def is_call(value: Expr, op: str) -> bool:
    """Whether an expression is a call to `relax.{op}`."""
    return isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.Op) and value.op.name == f"relax.{op}"


def shape(value: Expr) -> tuple[int, ...]:
    """Static shape of a tensor expression."""
    return tuple(int(n) for n in value.ty.shape)


def dtype(value: Expr) -> str:
    """Dtype of a tensor expression."""
    return str(value.ty.dtype)


def integer(value: Expr) -> int:
    """Convert a Relax or TIR integer to an int."""
    return int(value.value) if hasattr(value, "value") else int(value)


def constant(value: Expr) -> NDArray[Any]:
    """The numbers of a constant; raises `NoMatch` for any other expression."""
    if not isinstance(value, tvm.ir.GenericConst):
        raise NoMatch(f"expected a constant, found {describe(value)}")
    numbers: NDArray[Any] = value.value.numpy()
    return numbers


def number(value: Expr) -> float:
    """A constant of one number; raises `NoMatch` for any other expression."""
    found = constant(value)
    if found.size != 1:
        raise NoMatch(f"expected one number, found {found.size}")
    return float(found.reshape(())[()])


def expect_constant(value: Expr, expected: NDArray[Any] | float) -> None:
    """Raise `NoMatch` unless a constant is exactly `expected`."""
    found = constant(value)
    if not np.array_equal(found.reshape(-1), np.asarray(expected, dtype=found.dtype).reshape(-1)):
        raise NoMatch(f"expected the constant {expected}, found {found}")


def describe(value: Expr) -> str:
    """Describe an expression in a few words, for messages."""
    if isinstance(value, relax.Call):
        return value.op.name if isinstance(value.op, tvm.ir.Op) else "a call"
    return type(value).__name__.lower()
