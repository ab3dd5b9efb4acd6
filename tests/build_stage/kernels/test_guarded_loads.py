"""No kernel loads from behind a buffer because only a condition within an expression seems to guard the load."""

import pytest
from tvm.script import tirx as T

from build.kernels.cpu.level import LEVELS
from build.kernels.shapes import Embedding, Linear, Mixture, RollingAttention
from build.kernels.table import kernels_of
from export.weights.format import Storage
from runtime.artifact.manifest import TargetSpec
from tests.helpers.guarded_loads import unguarded

SPECS = {
    "cuda": TargetSpec(kind="cuda", dtype="fp32", cpu="x86-64-v3", cpu_features=(), arch=("sm_80",)),
    "tensor cores": TargetSpec(kind="cuda", dtype="fp16", cpu="x86-64-v3", cpu_features=(), arch=("sm_80",)),
    **{
        level.name: TargetSpec(kind="llvm", dtype="fp32", cpu=level.cpu, cpu_features=level.flags)
        for level in LEVELS
        if level.name in ("amx", "avx2")
    },
}
FLOAT16 = Storage(dtype="float16")
INT8 = Storage(dtype="int8")
INT8_GROUPS = Storage(dtype="int8", group_size=64, offsets="zero_points", reordered=True)
INT8_DYNAMIC = Storage(dtype="int8", rounding="int8")
INT4 = Storage(dtype="int4", group_size=32)

# Sizes that fill no panel, vector, tile or block, and one row, a few and many.
ROWS = ((1, 1), (3, 1), (1, 70))
EVERYWHERE = [
    *(("linear", Linear(lead, 45, 37, INT8, norm_eps=1e-5, residual=True)) for lead in ROWS),
    *(("linear", Linear(lead, 45, 2051, INT8_GROUPS)) for lead in ROWS),
    *(("linear", Linear(lead, 192, 96, INT4, swiglu=True)) for lead in ROWS),
    ("linear", Linear((1, 70), 45, 37, FLOAT16)),
    ("mixture", Mixture((1, 7), 40, 33, 5, 2, INT8)),
    *(
        ("rolling_attention", RollingAttention(rows, tokens, 4, 2, 32, 3, 70, 96, dtype, 0.25))
        for rows, tokens in ((3, 1), (1, 24))
        for dtype in ("float16", "float8_e4m3fn", "uint8")
    ),
]
CALLS = [
    *((target, *call) for target in ("tensor cores", "avx2") for call in EVERYWHERE),
    *((target, "embedding", Embedding((2, 3), 77, 299, INT8)) for target in ("cuda", "avx2")),
    *(("amx", "linear", Linear(lead, 45, 37, INT8_DYNAMIC)) for lead in ROWS),
    ("cuda", "linear", Linear((1, 70), 45, 37, INT8)),
    ("cuda", "rolling_attention", RollingAttention(1, 24, 4, 2, 32, 3, 70, 96, "float32", 0.25)),
    # vocabularies to which tokens were added, with which a thread's share of the ids goes beyond the end
    *(("cuda", "sample", vocab_size) for vocab_size in (1025, 32002, 32003)),
]


@pytest.mark.parametrize(("target", "op", "shape"), CALLS)
def test_no_load_leaves_its_buffer(target, op, shape):
    spec = SPECS[target]
    assert unguarded(kernels_of(spec)[op](shape), spec.kind) == []


@T.prim_func
def guarded(x: T.Buffer((5,), "float32"), y: T.Buffer((8,), "float32")):
    for i in T.serial(8):
        if i < 5:
            y[i] = x[i]
        y[i] = y[i] + T.if_then_else(i < 5, x[i], T.float32(0))


@T.prim_func
def joined(x: T.Buffer((5,), "float32"), y: T.Buffer((8,), "float32")):
    for i in T.serial(8):
        if T.And(i < 5, x[i] > T.float32(0)):
            y[i] = T.float32(0)


@T.prim_func
def selected(x: T.Buffer((5,), "float32"), y: T.Buffer((8,), "float32")):
    for i in T.vectorized(8):
        y[i] = T.Select(i >= 5, T.float32(0), x[i])


@T.prim_func
def nested(x: T.Buffer((5,), "float32"), y: T.Buffer((8,), "float32")):
    """TVM makes one condition of the two, and drops the minimum."""
    for i in T.serial(8):
        y[i] = T.if_then_else(
            i < 5, T.if_then_else(x[T.min(i, 4)] > T.float32(0), T.float32(1), T.float32(0)), T.float32(0)
        )


@pytest.mark.parametrize("kernel", [joined, selected, nested])
def test_it_is_found(kernel):
    assert unguarded(kernel, "llvm")
    assert unguarded(guarded, "llvm") == []
