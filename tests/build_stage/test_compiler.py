"""Targets for a CPU: what LLVM is told not to do."""

import numpy as np
import pytest
from tvm.script import tirx as T

from build.compiler import llvm_target, tvm


# The least processor and one with AVX2, which every machine of ours has.
@pytest.mark.parametrize("cpu", ["x86-64", "x86-64-v3"])
def test_an_index_that_wraps_is_not_read_straight_on(cpu):
    """LLVM 22's loop vectorizer reads eight numbers in a row in place of four numbers twice (docs/llvm.md)."""

    @T.prim_func
    def kernel(rows: T.Buffer((1,), "int64"), table: T.Buffer((128,), "float32"), out: T.Buffer((64,), "float32")):
        T.func_attr({"tirx.noalias": True})
        row = T.Cast("int32", rows[0]) % 2
        for i in T.serial(64):
            out[i] = table[row * 8 + i % 4]

    module = tvm.IRModule({"kernel": kernel.with_attr("global_symbol", "kernel")})
    table, out = (tvm.runtime.tensor(np.arange(size, dtype=np.float32)) for size in (128, 64))
    tvm.compile(module, target=llvm_target(cpu))["kernel"](tvm.runtime.tensor(np.array([1])), table, out)
    np.testing.assert_array_equal(out.numpy(), 8 + np.arange(64) % 4)
