"""Matrix products of the CPU kernels on random numbers: their formats, their arguments and their exact results."""

from dataclasses import dataclass

import msgspec
import numpy as np
import pytest
import tvm_ffi

from build.kernels.cpu.linear import linear
from build.kernels.shapes import Linear
from export.weights.encoded import OFFSET_SUFFIXES
from export.weights.format import ModelTensor, Storage
from export.weights.table import carry, load, store
from runtime.artifact.cpu import missing_features
from runtime.engines.cpu_level import usable_features
from tests.helpers.encoded import rows_for
from tests.helpers.kernels import ALIGNMENT, PROCESSORS, aligned, compiled, packed

CARRIED = {  # formats that only a checkpoint's own numbers have
    "int4 minimums": Storage(dtype="int4", group_size=32, offsets="minimums"),
    "int4 float32 minimums": Storage(dtype="int4", group_size=256, offsets="minimums", scales="float32"),
    "int4 reordered": Storage(dtype="int4", group_size=64, scales="float32", reordered=True),
    "int8 groups": Storage(dtype="int8", group_size=16, scales="float32"),
    "int8 zero points": Storage(dtype="int8", group_size=128, offsets="zero_points"),
    "int8 minimums": Storage(dtype="int8", group_size=32, offsets="minimums"),
    "float8": Storage(dtype="float8"),
    "float8 groups": Storage(dtype="float8", group_size=128, scales="float32"),
}
FORMATS = {
    "float32": Storage(dtype="float32"),
    "float16": Storage(dtype="float16"),
    "bfloat16": Storage(dtype="bfloat16"),
    "int8": Storage(dtype="int8"),
    "int4-32": Storage(dtype="int4", group_size=32),
    "int4-128-zero-points": Storage(dtype="int4", group_size=128, offsets="zero_points"),
    **{f"carried {name}": stored for name, stored in CARRIED.items()},
}
DYNAMIC = {
    "int8": Storage(dtype="int8", rounding="int8"),
    "int4-32": Storage(dtype="int4", group_size=32, rounding="int8"),
    "int4-128-zero-points": Storage(dtype="int4", group_size=128, offsets="zero_points", rounding="int8"),
    "int8 of 16 bits": Storage(dtype="int8", rounding="int16"),
    **{
        f"carried {name}": msgspec.structs.replace(stored, rounding="int16")
        for name, stored in CARRIED.items()
        if stored.dtype != "float8"
    },
}
FUSED = {
    "alone": {},
    "norm, residual": {"norm_eps": 1e-5, "residual": True},
    "norm, swiglu": {"norm_eps": 0.1, "swiglu": True},
}


# Levels with an instruction that the compiler cannot replace by others.
OWN_INSTRUCTIONS = ("amx", "avx512-bf16", "avx512-vnni", "avx-vnni")


def skip_unless_runnable(level):
    """Skip a test if neither this machine nor the compiler has a level's instructions."""
    if level.name in OWN_INSTRUCTIONS and (missing := missing_features(level.flags, usable_features())):
        pytest.skip(f"this machine lacks {', '.join(missing)}")


def processor_of(level):
    """The processor for which a level is compiled to run here.

    It is the level's own, or one without its wide registers, for which the compiler splits its vectors.
    """
    return (
        PROCESSORS["avx2"] if level.name not in PROCESSORS or missing_features(level.flags) else PROCESSORS[level.name]
    )


def call(kernel, *arrays):
    """Call a kernel; arrays changed in place must be `aligned` by the caller, the others are copied."""
    kernel(*(tvm_ffi.from_dlpack(array if array.ctypes.data % ALIGNMENT == 0 else aligned(array)) for array in arrays))


def output(*shape):
    """An array filled with NaN, so that an element that is never written shows."""
    return aligned(np.full(shape, np.nan, np.float32))


@dataclass(frozen=True)
class Product:
    """The arguments of a product kernel, and the result that it must give, in float64."""

    shape: Linear
    arrays: list
    exact: np.ndarray
    size: np.ndarray  # sum |x w|, by which errors of products are measured
    levels: np.ndarray | None  # what is rounded to whole numbers


def product(shape, seed=0):
    generator = np.random.default_rng(seed)
    tensor = ModelTensor(name="w", shape=(shape.n, shape.k), stored=shape.weight)
    stored = stored_at_random(tensor, generator)
    weight = load(tensor, stored).astype(np.float64)
    parts = packed(tensor, stored, "llvm", 2)
    x = generator.standard_normal((*shape.x_lead, shape.k)).astype(np.float32)
    if shape.weight.rounding == "int16":
        x = whole_levels(x, shape)
    gain = generator.standard_normal(shape.k).astype(np.float32)
    residual = generator.standard_normal((*shape.lead, shape.n_out)).astype(np.float32)
    column = None if shape.one_of is None else np.array([shape.one_of - 2])
    wide = (x if column is None else x[:, column]).astype(np.float64)
    if shape.norm_eps is not None:
        wide = wide / np.sqrt((wide * wide).mean(-1, keepdims=True) + np.float32(shape.norm_eps)) * gain
    size_of = magnitudes(tensor, stored)
    if shape.weight.reordered:  # tokens are rounded in the order in which the groups are adjacent
        wide, weight, size_of = (values[..., stored["w_order"]] for values in (wide, weight, size_of))
    levels = None
    if shape.weight.rounds:
        levels, scales = in_levels(wide, shape)
        wide = (np.rint(levels) * scales).reshape(wide.shape)
    exact, size = wide @ weight.T, np.abs(wide) @ size_of.T
    arrays = [x, *([] if column is None else [column])]
    arrays += [*([gain] if shape.norm_eps is not None else []), *parts, *([residual] if shape.residual else [])]
    return Product(shape, arrays, exact + (residual if shape.residual else 0), size, levels)


def stored_at_random(tensor, generator):
    """Stored arrays of a random matrix: the numbers of a checkpoint, where nothing is rounded to the format."""
    if msgspec.structs.replace(tensor.stored, rounding="none") in CARRIED.values():
        return carry(tensor, rows_for(tensor.stored, *tensor.shape))
    scale = generator.uniform(0.1, 2, (tensor.shape[0], 1)).astype(np.float32)
    return store(tensor, generator.standard_normal(tensor.shape).astype(np.float32) * scale)


def magnitudes(tensor, stored):
    """|scale q| + |scale zero| or |minimum| of each weight: what is added up to it."""
    kind = tensor.stored
    weight = load(tensor, stored).astype(np.float64)
    if kind.offsets == "none":
        return np.abs(weight)
    k = tensor.shape[1]
    added = np.repeat(np.abs(stored["w" + OFFSET_SUFFIXES[kind.offsets]].astype(np.float64)), kind.group_size, 1)[:, :k]
    if kind.zero_points:
        added = added * np.repeat(stored["w_scale"].astype(np.float64), kind.group_size, 1)[:, :k]
    return np.abs(weight) + 2 * added


def whole_levels(x, shape):
    """x rounded to whole multiples of 2^-12, of which the first in each group is the largest level.

    Between levels of 16 bits there is no room in which float32 certainly takes the same one as float64.
    """
    found = np.rint(x * 2**12).clip(-LEVELS_OF["int16"], LEVELS_OF["int16"])
    groups = found[..., ordered_columns(shape)].reshape(*x.shape[:-1], -1, rounded_together(shape))
    groups[..., 0] = LEVELS_OF["int16"]
    found[..., ordered_columns(shape)] = groups.reshape(x.shape)
    return (found / 2**12).astype(np.float32)


def ordered_columns(shape):
    """The order of the columns of the matrix that `product` makes."""
    if not shape.weight.reordered:
        return np.arange(shape.k)
    return rows_for(shape.weight, shape.n, shape.k).order


LEVELS_OF = {"int8": 127, "int16": 32512}


def rounded_together(shape):
    """64 numbers, or as many as a group of the weight, or all of them."""
    group = shape.weight.group_size or 64
    return shape.k if shape.k % group else group


def in_levels(wide, shape):
    """x (..., K) as (..., groups, numbers) in units of its groups' scales, and these scales."""
    groups = wide.reshape(*wide.shape[:-1], -1, rounded_together(shape))
    scales = np.abs(groups).max(-1, keepdims=True) / LEVELS_OF[shape.weight.rounding]
    return groups / scales, scales


def run_product(level, processor, made):
    y = output(*made.shape.lead, made.shape.n_out)
    call(compiled(linear(level, made.shape), processor), *made.arrays, y)
    return y
