"""Kernels whose parameters depend on the shape: written once with every parameter, then stripped of the unused ones."""

from collections.abc import Collection

from tvm.tirx import PrimFunc

UNUSED = (1,)  # shape to declare for a parameter that will be dropped


def without(function: PrimFunc, names: Collection[str]) -> PrimFunc:
    """Return the function without the named parameters, which its body must not use."""
    kept = [parameter for parameter in function.params if parameter.name not in names]
    return PrimFunc(kept, function.body, function.ret_type, function.attrs)
