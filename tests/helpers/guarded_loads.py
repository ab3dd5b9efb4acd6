"""Does a kernel load from behind a buffer, where a condition only seems to keep it from that?

An `if`, and the branches of `T.if_then_else`, are run only where their condition holds. `And`, `Or` and `Select`
compute all their operands on a CPU. On a GPU they may too: TVM writes what `T.reinterpret` and `T.if_then_else` need in
front of the statement. And TVM makes an `And` of two nested conditions, and drops a `T.min` that it takes to be
superfluous under the first.

So a load within these operands must be inside its buffer without them; one for which TVM can prove that only with them
is found. What it can never prove is not, such as an index from memory.
"""

from contextlib import ExitStack

import tvm_ffi
from tvm.sym import Analyzer, ProofStrength

from build.compiler import tvm
from tests.helpers.index_bounds import CONDITIONAL, is_integer, lowered

tirx = tvm.tirx


def unguarded(function, kind):
    """Every load that leaves its buffer but for such a condition, as text.

    The kernel is looked at as it was made, where a vector is still a loop, and as the code generators get it.
    """
    return [load for part in (function, *lowered(function, kind)) for load in _Loads(part).found]


class _Loads:
    def __init__(self, function):
        self.analyzer = Analyzer()
        self.assumed = []  # conditions of the expressions around a node, which keep nothing from being computed
        self.scalars = {}  # a variable for each load: TVM proves nothing from a condition that reads memory
        self.found = []
        self._walk(function.body)

    def _walk(self, *nodes):
        for node in nodes:
            tvm_ffi.structural_walk(node, (object, self._visit), order="pre")

    def _visit(self, node):
        if isinstance(node, tirx.For):
            self._walk(node.min, node.extent)
            self._bind(node.loop_var, tvm.ir.Range.from_min_extent(self._pure(node.min), self._pure(node.extent)))
            self._walk(node.body)
        elif isinstance(node, tirx.IfThenElse):
            self._branch(node.condition, node.then_case, node.else_case)
        elif isinstance(node, tvm.ir.Call) and node.op.name == CONDITIONAL:
            self._branch(*node.args)
        elif isinstance(node, tirx.Select):
            self._walk(node.condition)
            self._assume(node.condition, node.true_value)
            self._assume(tirx.Not(node.condition), node.false_value)
        elif isinstance(node, (tirx.And, tirx.Or)):
            self._walk(node.a)
            self._assume(node.a if isinstance(node, tirx.And) else tirx.Not(node.a), node.b)
        else:
            self._note(node)
            return tvm_ffi.WalkResult.ADVANCE
        return tvm_ffi.WalkResult.SKIP

    def _note(self, node):
        if isinstance(node, tirx.AttrStmt) and node.attr_key == "thread_extent":
            self._bind(node.node.var, tvm.ir.Range.from_min_extent(0, node.value))
        elif isinstance(node, tirx.Bind) and is_integer(node.value):
            self._bind(node.var, self._pure(node.value))
        elif isinstance(node, tvm.ir.TensorLoad) and self.assumed:
            self.found += [f"{node} where {bound}" for bound in self._bounds(node) if self._is_only_assumed(bound)]

    def _branch(self, condition, when_true, when_false):
        self._walk(condition)
        with self._scope(condition):
            self._walk(when_true)
        with self._scope(tirx.Not(condition)):
            self._walk(when_false)

    def _assume(self, condition, operand):
        self.assumed.append(condition)
        self._walk(operand)
        self.assumed.pop()

    def _bounds(self, load):
        """What must hold for a load to be inside its buffer."""
        for index, size in zip(load.indices, load.source.shape, strict=True):
            first = last = index
            if isinstance(index, tirx.Ramp):
                first, last = index.base, index.base + index.stride * (index.lanes - 1)
            yield self._pure(first >= 0)
            yield self._pure(last < size)

    def _is_only_assumed(self, bound):
        if self._proves(bound):
            return False
        with ExitStack() as scopes:
            for condition in self.assumed:
                scopes.enter_context(self._scope(condition))
            return self._proves(bound)

    def _proves(self, bound):
        return self.analyzer.can_prove(bound, ProofStrength.SYMBOLIC_BOUND)

    def _scope(self, condition):
        return self.analyzer.constraint_scope(self._pure(condition))

    def _bind(self, variable, value):
        self.analyzer.bind(variable, value, allow_override=True)

    def _pure(self, expression):
        """The expression with a variable in place of each load."""
        return tvm_ffi.structural_map(expression, [(tvm.ir.TensorLoad, self._scalar)], order="pre")

    def _scalar(self, load):
        return self.scalars.setdefault(tvm_ffi.StructuralKey(load), tirx.Var(f"loaded_{len(self.scalars)}", load.ty))
