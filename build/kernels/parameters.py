"""Kernels whose parameters depend on their shape: written once with every parameter, then stripped of those that a shape does not have."""

from collections.abc import Collection

from tvm.tirx import PrimFunc

UNUSED = (1,)  # the shape to declare for a parameter that will be dropped


def without(function: PrimFunc, names: Collection[str]) -> PrimFunc:
    """The function without the parameters of these names, which its body does not use."""
    kept = [parameter for parameter in function.params if parameter.name not in names]
    return PrimFunc(kept, function.body, function.ret_type, function.attrs)
