"""Bytes that a kernel loads from memory, counted from its loops.

The count reflects the schedule, not the formula that the dispatch report states.
"""

from collections import Counter

import numpy as np

from build.compiler import tvm

EXPRESSIONS = ("a", "b", "value", "condition", "true_value", "false_value")


def loaded_bytes(function) -> Counter[str]:
    """Bytes loaded from each buffer of a TIR function, by name; every load counts, cached or not.

    Every guard is taken to be true, except one that leaves out the first iteration of a loop (0 < variable).
    """
    found: Counter[str] = Counter()
    extents = {}

    def statement(node, times):
        kind = type(node).__name__
        if kind == "SeqStmt":
            for child in node.seq:
                statement(child, times)
        elif kind == "For":
            extent = node.extent
            assert hasattr(extent, "value"), f"the loop over {node.loop_var} has no fixed length"
            extents[node.loop_var] = int(extent.value)
            statement(node.body, times * int(extent.value))
        elif kind == "IfThenElse":
            expression(node.condition, times)
            extent = first_round(node.condition)
            statement(node.then_case, times // extent * (extent - 1) if extent else times)
            if node.else_case is not None:
                statement(node.else_case, times)
        elif kind == "BufferStore":
            expression(node.value, times)
            for index in node.indices:
                expression(index, times)
        elif hasattr(node, "value"):
            expression(node.value, times)

    def first_round(condition):
        """The extent of the loop whose first iteration a condition leaves out, if it does."""
        kind = type(condition).__name__
        low, high = (
            (condition.a, condition.b) if kind == "LT" else (condition.b, condition.a) if kind == "GT" else (None, None)
        )
        return extents.get(high) if isinstance(low, tvm.tirx.IntImm) and int(low) == 0 else None

    def expression(node, times):
        if type(node).__name__ == "TensorLoad":
            found[node.source.name] += times * np.dtype(str(node.source.dtype)).itemsize
            for index in node.indices:
                expression(index, times)
        for name in EXPRESSIONS:
            child = getattr(node, name, None)
            if isinstance(child, tvm.ir.Expr):
                expression(child, times)
        for child in getattr(node, "args", ()):
            if isinstance(child, tvm.ir.Expr):
                expression(child, times)

    statement(function.body, 1)
    return found
