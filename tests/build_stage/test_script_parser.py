"""Kernels become what TVM's own functions parse them into, and mistakes in them are still found."""

import inspect

import pytest
import tvm_ffi
from tvm.error import DiagnosticError
from tvm.script import tirx as T

from build import script_parser
from build.kernels.shapes import Linear
from build.kernels.table import kernels_of
from export.weights.format import Storage
from runtime.artifact.manifest import TargetSpec

TARGETS = {
    "llvm": TargetSpec(kind="llvm", dtype="fp32", cpu="x86-64-v3", cpu_features=(), arch=()),
    "cuda": TargetSpec(kind="cuda", dtype="fp16", cpu="x86-64-v3", cpu_features=(), arch=("sm_80",)),
}
INT4 = Linear((1, 3), 64, 64, Storage(dtype="int4", group_size=32, offsets="zero_points"), norm_eps=1e-5, residual=True)


@pytest.mark.parametrize("kind", TARGETS)
def test_a_kernel_is_the_one_that_tvm_parses(monkeypatch, kind):
    make = kernels_of(TARGETS[kind])["linear"]
    found = make(INT4)
    monkeypatch.setattr(script_parser.kernel_entry, "inspect", inspect)
    monkeypatch.setattr(script_parser.entry, "Source", script_parser.Source)
    monkeypatch.setattr(script_parser.Source, "as_ast", lambda source: script_parser.doc.parse(source.source))
    monkeypatch.setattr(script_parser.evaluator, "_eval_expr", script_parser._evaluated_by_python)
    assert tvm_ffi.structural_equal(found, make(INT4))


def filled(value):
    """A kernel with an inline function inside, the syntax tree of which TVM's parser changes."""

    @T.prim_func
    def kernel(out: T.Buffer((4,), "float32")):
        @T.inline
        def store(i):
            out[i] = T.float32(value)

        for i in T.serial(4):
            store(i)

    return kernel


def test_a_function_inside_a_kernel_is_parsed_each_time():
    assert [str(filled(value)).count(f"T.float32({value})") for value in (1.0, 2.0)] == [1, 1]


def test_an_unknown_name_is_refused():
    with pytest.raises(DiagnosticError, match="unknown"):

        @T.prim_func
        def kernel(out: T.Buffer((4,), "float32")):
            out[0] = unknown.value  # noqa: F821
