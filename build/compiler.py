"""The one place that imports TVM's compiler, without torch: `tvm_ffi` would import an installed torch, a second and 200 MB for nothing."""

import sys

if "torch" in sys.modules:
    import tvm
else:
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        import tvm
    finally:
        del sys.modules["torch"]

from tvm import relax
from tvm.relax.frontend.onnx import from_onnx
from tvm.support import cc
from tvm.target import codegen

__all__ = ["cc", "codegen", "from_onnx", "relax", "tvm"]
