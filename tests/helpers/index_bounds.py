"""Does an index of a lowered kernel wrap? Found from the bounds of loops alone, so that no memory is needed.

`wrapping` looks at a kernel as TVM's code generators get it. Every loop, thread and named scalar has an interval;
the sums and products that indices, conditions and loop lengths are made of are computed on intervals in exact
arithmetic, and each that leaves its own type is reported. What a kernel loads from memory may be any number of its
type, unless the caller says otherwise.
"""

from itertools import product

import tvm_ffi

from build.compiler import tvm
from build.tvm_stage.target import TVM_TARGETS

tirx = tvm.tirx
HOST = tvm.target.Target({"kind": "llvm", "mcpu": "x86-64-v3"})
TARGETS = {
    "llvm": HOST.with_host(HOST),
    "cuda": tvm.target.Target({"kind": "cuda", "arch": "sm_80"}, host=HOST),
}
CONDITIONAL = "prim.if_then_else"
SUMS = (tirx.Add, tirx.Sub, tirx.Mul)


def lowered(function, kind):
    """The functions that the code generators of a target get for a kernel: on a GPU, one for each launch."""
    module = tvm.IRModule({"kernel": function.with_attr("global_symbol", "kernel")})
    with TARGETS[kind], tvm.transform.PassContext(disabled_pass=list(TVM_TARGETS["llvm"].skipped)):
        module = tirx.transform.BindTarget(TARGETS[kind])(module)
        pipeline, _, _ = tirx.get_default_tir_pipeline(TARGETS[kind])
        return list(pipeline(module).functions.values())


def wrapping(function, kind, memory):
    """Every sum or product that may wrap, as text.

    `memory` gives the bounds of integers in parameters, by the parameter's name.
    """
    return [problem for part in lowered(function, kind) for problem in _Intervals(part, memory).problems()]


class _Intervals:
    def __init__(self, function, memory):
        self.memory = memory
        self.ranges = {}  # of loops and threads: (first, extent)
        self.named = {}  # by the variable or buffer: the values that it gets
        self.known = {}  # intervals of the same
        self.found = {}
        self.roots = []
        tvm_ffi.structural_walk(function.body, (object, self._collect), order="pre")

    def problems(self):
        for root in self.roots:
            self.of(root)
        return list(self.found)

    def _collect(self, node):
        if isinstance(node, tirx.For):
            self.ranges[node.loop_var] = (node.min, node.extent)
            self.roots += [node.min, node.extent]
        elif isinstance(node, tirx.AttrStmt) and node.attr_key == "thread_extent":
            self.ranges[node.node.var] = (tirx.IntImm("int32", 0), node.value)
        elif isinstance(node, tirx.Bind) and is_integer(node.value):
            self.named[node.var] = [node.value]
        elif isinstance(node, tirx.BufferStore):
            self.roots += list(node.indices)
            if str(node.buffer.dtype) in ("int32", "int64"):
                self.named.setdefault(node.buffer, []).append(node.value)
                if node.buffer.scope() == "local":  # on a CPU too: what a kernel gives a name
                    self.roots.append(node.value)
        elif isinstance(node, tvm.ir.TensorLoad):
            self.roots += list(node.indices)
        elif isinstance(node, tvm.ir.prim.expr.CmpExpr) and is_integer(node.a):
            self.roots += [node.a, node.b]

    def of(self, value):
        """The interval of an integer expression; notes whether it may wrap."""
        lowest, highest = self._exact(value)
        least, most = _type_bounds(value)
        if least <= lowest and highest <= most:
            return lowest, highest
        if isinstance(value, SUMS):
            self.found[f"{value} is {lowest} .. {highest}"] = True
        return least, most

    def _exact(self, value):
        if isinstance(value, tirx.IntImm):
            return int(value), int(value)
        if isinstance(value, tirx.Ramp):
            base, stride, lanes = self.of(value.base), self.of(value.stride), int(value.lanes) - 1
            return base[0] + min(stride[0] * lanes, 0), base[1] + max(stride[1] * lanes, 0)
        if isinstance(value, (tirx.Broadcast, tirx.Cast)):
            return self.of(value.value) if is_integer(value.value) else _type_bounds(value)
        if isinstance(value, tirx.Select):
            return _hull([self.of(value.true_value), self.of(value.false_value)])
        if isinstance(value, tirx.Var):
            return self._variable(value)
        if isinstance(value, tvm.ir.TensorLoad):
            return self._loaded(value)
        if isinstance(value, tvm.ir.Call) and value.op.name == CONDITIONAL:
            return _hull([self.of(argument) for argument in value.args[1:]])
        if not hasattr(value, "a"):
            return _type_bounds(value)
        return _combined(type(value), self.of(value.a), self.of(value.b), _type_bounds(value))

    def _variable(self, variable):
        if variable not in self.known:
            self.known[variable] = _type_bounds(variable)
            if variable in self.ranges:
                first, extent = map(self.of, self.ranges[variable])
                self.known[variable] = first[0], max(first[1] + extent[1] - 1, first[0])
            elif variable in self.named:
                self.known[variable] = self.of(*self.named[variable])
        return self.known[variable]

    def _loaded(self, load):
        buffer = load.source
        name = buffer.name.rstrip("0123456789").rstrip("_")
        if name in self.memory:
            return self.memory[name]
        if buffer not in self.known:
            self.known[buffer] = _type_bounds(load)  # for values that depend on the buffer itself
            if buffer in self.named:
                self.known[buffer] = _hull([self.of(value) for value in self.named[buffer]])
        return self.known[buffer]


def _combined(kind, left, right, unknown):
    """The interval of an operation on two intervals."""
    if kind is tirx.Add:
        return left[0] + right[0], left[1] + right[1]
    if kind is tirx.Sub:
        return left[0] - right[1], left[1] - right[0]
    if kind is tirx.Mul:
        ends = [a * b for a, b in product(left, right)]
        return min(ends), max(ends)
    if kind is tirx.Min:
        return min(left[0], right[0]), min(left[1], right[1])
    if kind is tirx.Max:
        return max(left[0], right[0]), max(left[1], right[1])
    if right[0] <= 0:
        return unknown
    if kind in (tirx.FloorMod, tirx.Mod) and (kind is tirx.FloorMod or left[0] >= 0):
        return left if left[0] >= 0 and left[1] < right[0] else (0, right[1] - 1)
    if kind in (tirx.FloorDiv, tirx.Div):
        ends = [a // b for a, b in product(left, right)]
        return min(ends), max(ends)
    if kind is tirx.RShift and right[0] == right[1]:
        return left[0] >> right[0], left[1] >> right[0]
    if kind is tirx.BitwiseAnd and right[0] == right[1]:
        return 0, right[1]
    return unknown


def _hull(intervals):
    lows, highs = zip(*intervals, strict=True)
    return min(lows), max(highs)


def is_integer(value):
    return isinstance(value.ty, tvm.ir.PrimType) and str(value.ty.dtype).startswith(("int", "uint"))


def _type_bounds(value):
    name = str(value.ty.dtype).partition("x")[0]
    bits = int("".join(c for c in name if c.isdigit()))
    return (0, 2**bits - 1) if name.startswith("u") else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
