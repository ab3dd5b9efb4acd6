"""Indices of 64 bits, for kernels whose buffers have too many elements for 32.

TVM counts loops in int32, and whatever a kernel computes from them stays int32: an index into a buffer of 2**31
elements wraps, and the kernel silently reads and writes numbers of another sequence, expert or row. So a kernel with
such a buffer is rewritten before TVM lowers it: loops, the scalars that a kernel names, and the indices and
comparisons made of both are int64. TVM's NarrowDataType then takes back what provably fits into 32 bits.

All other kernels stay exactly as they are, because int64 indices cost registers on a GPU.
"""

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import tvm
import tvm_ffi
from tvm import tirx

Expr = Any

# A kernel may compute indices that lie behind the end of a buffer and not use them: the last tile is seldom full, and
# weights are prefetched. All tiles and distances are shorter than this.
BEYOND_END = 2**20
NARROW_ELEMENTS = 2**31 - BEYOND_END  # a buffer of at most so many elements can be indexed by int32

NARROW, WIDE = "int32", "int64"
ARITHMETIC = (tirx.Add, tirx.Sub, tirx.Mul, tirx.FloorDiv, tirx.FloorMod, tirx.Div, tirx.Mod, tirx.Min, tirx.Max)
COMPARISONS = (tirx.EQ, tirx.NE, tirx.LT, tirx.LE, tirx.GT, tirx.GE)
CONDITIONAL = "prim.if_then_else"


def kernels_with_fitting_indices(makers: Mapping[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """The same makers of kernels; those of kernels with very large buffers return them `widened`."""

    def fitting(maker: Callable[..., Any]) -> Callable[..., Any]:
        def make(*arguments: Any, **options: Any) -> Any:
            kernel = maker(*arguments, **options)
            return widened(kernel) if largest_buffer(kernel) > NARROW_ELEMENTS else kernel

        return make

    return {op: fitting(maker) for op, maker in makers.items()}


def largest_buffer(function: tirx.PrimFunc) -> int:
    """Number of elements of the largest buffer that a kernel takes, declares or allocates."""
    buffers = list(function.params)
    tvm_ffi.structural_walk(
        function.body, ((tirx.AllocBuffer, tirx.DeclBuffer), lambda node: buffers.append(node.buffer))
    )
    return max(prod(map(int, buffer.shape)) for buffer in buffers)


def widened(function: tirx.PrimFunc) -> tirx.PrimFunc:
    """The same kernel with indices in int64."""
    return _Widening().function(function)


def _is_narrow(value: Expr) -> bool:
    return isinstance(value.ty, tvm.ir.PrimType) and str(value.ty.dtype) == NARROW


class _Widening:
    """Rewrites one function. `index` makes an expression int64, `value` keeps its type.

    Whatever stays int32 although it is computed from a loop, such as a number that is stored, is cast back.
    """

    def __init__(self) -> None:
        self.new: dict[Any, Any] = {}  # loop variables, and buffers whose shape or type has changed
        self.wide_scalars: set[Any] = set()  # int32 buffers of one element, which hold what a kernel gives a name
        self.holding_counts: set[Any] = set()  # buffers that stay int32 and into which such numbers are stored
        self.callbacks = [
            (tirx.For, self._loop),
            (tirx.AllocBuffer, self._allocation),
            (tirx.DeclBuffer, self._declaration),
            (tirx.BufferStore, self._store),
            (tvm.ir.TensorLoad, self._load),
            (COMPARISONS, self._comparison),
            (ARITHMETIC, self._arithmetic),
            (tvm.ir.Var, self._variable),
        ]

    def function(self, function: tirx.PrimFunc) -> tirx.PrimFunc:
        """Rewrite parameters and body."""
        parameters = [self._buffer(parameter) for parameter in function.params]
        return tirx.PrimFunc(parameters, self.value(function.body), function.ret_type, function.attrs)

    def value(self, node: Any) -> Any:
        """Rewrite whatever is inside `node`, and keep its type."""
        return tvm_ffi.structural_mutate(node, self.callbacks)

    def index(self, value: Expr) -> Expr:
        """Rewrite an integer into int64, computed in int64 from its loop variables on."""
        if isinstance(value, tirx.IntImm):
            return tirx.IntImm(WIDE, int(value))
        if isinstance(value, tirx.Ramp):
            return tirx.Ramp(self.index(value.base), self.index(value.stride), value.lanes)
        if not _is_narrow(value):
            return self.value(value)
        if isinstance(value, tvm.ir.Var) and value in self.new:
            return self.new[value]
        if isinstance(value, ARITHMETIC):
            return type(value)(self.index(value.a), self.index(value.b))
        if isinstance(value, tirx.Select):
            return tirx.Select(self.value(value.condition), self.index(value.true_value), self.index(value.false_value))
        if isinstance(value, tvm.ir.Call) and value.op.name == CONDITIONAL:
            condition, if_true, if_false = value.args
            return tirx.if_then_else(self.value(condition), self.index(if_true), self.index(if_false))
        if isinstance(value, tvm.ir.TensorLoad) and value.source in self.wide_scalars:
            return self._raw_load(value)
        return tirx.Cast(WIDE, self.value(value))

    def _loop(self, loop: tirx.For, _mutator: Any) -> tirx.For:
        variable = self.new[loop.loop_var] = tirx.Var(loop.loop_var.name, WIDE)
        start, extent = self.index(loop.min), self.index(loop.extent)
        bound = loop.thread_binding
        if bound is not None:
            bound = tirx.IterVar(None, tirx.Var(bound.var.name, WIDE), bound.iter_type, bound.thread_tag)
        return tirx.For(variable, start, extent, loop.kind, self.value(loop.body), bound, loop.annotations)

    def _buffer(self, buffer: Any) -> Any:
        """The buffer with a shape in int64, so that strides and sizes do not wrap either."""
        dtype, scope = str(buffer.dtype), buffer.scope()
        if dtype == NARROW and scope == "local" and tuple(map(int, buffer.shape)) == (1,):
            self.wide_scalars.add(buffer)
            dtype = WIDE
        shape = [tirx.IntImm(WIDE, int(size)) for size in buffer.shape]
        new = self.new[buffer] = tirx.decl_buffer(
            shape,
            dtype,
            buffer.name,
            elem_offset=self.index(buffer.elem_offset),
            scope=scope,
            data_alignment=buffer.data_alignment,
            offset_factor=buffer.offset_factor,
        )
        return new

    def _allocation(self, node: tirx.AllocBuffer, _mutator: Any) -> tirx.AllocBuffer:
        return tirx.AllocBuffer(self._buffer(node.buffer), annotations=node.annotations)

    def _declaration(self, node: tirx.DeclBuffer, _mutator: Any) -> tirx.DeclBuffer:
        data = self.value(node.data)
        return tirx.DeclBuffer(self._buffer(node.buffer), data=data)

    def _store(self, store: tirx.BufferStore, _mutator: Any) -> tirx.BufferStore:
        if store.buffer in self.wide_scalars:
            value = self.index(store.value)
        else:
            if _is_narrow(store.value) and self._counts(store.value):
                self.holding_counts.add(store.buffer)
            value = self.value(store.value)
        return tirx.BufferStore(self.new[store.buffer], value, [self.index(i) for i in store.indices])

    def _load(self, load: tvm.ir.TensorLoad, _mutator: Any) -> Expr:
        loaded = self._raw_load(load)
        return tirx.Cast(NARROW, loaded) if load.source in self.wide_scalars else loaded

    def _raw_load(self, load: tvm.ir.TensorLoad) -> Expr:
        return tirx.BufferLoad(self.new[load.source], [self.index(i) for i in load.indices])

    def _comparison(self, node: Expr, mutator: Any) -> Expr:
        if _is_narrow(node.a) and _is_narrow(node.b):
            return type(node)(self.index(node.a), self.index(node.b))
        return mutator.default_mutate(node)

    def _arithmetic(self, node: Expr, mutator: Any) -> Expr:
        """A sum or product whose value stays int32, such as a position that is stored: it must not wrap on the way."""
        if _is_narrow(node) and self._counts(node):
            return tirx.Cast(NARROW, self.index(node))
        return mutator.default_mutate(node)

    def _counts(self, value: Expr) -> bool:
        """Whether an integer is computed from loops; products of quantized numbers are not, and stay int32."""
        if isinstance(value, ARITHMETIC):
            return self._counts(value.a) or self._counts(value.b)
        if isinstance(value, tvm.ir.TensorLoad):
            return value.source in self.wide_scalars or value.source in self.holding_counts
        return isinstance(value, tvm.ir.Var) and value in self.new

    def _variable(self, variable: Any, _mutator: Any) -> Expr:
        if variable not in self.new:
            return variable
        return tirx.Cast(NARROW, self.new[variable]) if _is_narrow(variable) else self.new[variable]
