"""The one place that imports TVM's compiler, without torch, and that makes its targets for a CPU.

`tvm_ffi` would import torch if it is installed, which costs a second and 200 MB for nothing.
"""

import sys
from typing import Any

if "torch" in sys.modules:
    import tvm
else:
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        import tvm
    finally:
        del sys.modules["torch"]

import tvm_ffi  # after TVM
from tvm import relax
from tvm.relax.frontend.onnx import from_onnx
from tvm.support import cc
from tvm.target import codegen

from build import script_parser  # after TVM

__all__ = ["cc", "codegen", "from_onnx", "llvm_target", "processor_target", "relax", "tvm", "tvm_ffi"]

script_parser.speed_up()

# LLVM 20 to 22 vectorize a loop over `table[row + i % 4]` as if the index never wrapped (docs/llvm.md). No limit on the
# vectorizer's checks helps, because it adds these after it has counted them. Our kernels write their own vectors and
# lose next to nothing without it; the other pass that relies on such checks takes none.
SOUND = ("-vectorize-loops:bool=0", "-loop-load-elimination-scev-check-threshold:uint=0")


def llvm_target(cpu: str, **options: Any) -> Any:  # noqa: ANN401 (TVM's targets are untyped)
    """The target of all code for a CPU, by LLVM's name of it; `options` are further attributes of TVM's target."""
    return tvm.target.Target({"kind": "llvm", "mcpu": cpu, "cl-opt": list(SOUND), **options})


def processor_target(processor: str, **options: Any) -> Any:  # noqa: ANN401
    """`llvm_target` of a processor whose name may be followed by LLVM's attributes, after commas."""
    name, *attributes = processor.split(",")
    return llvm_target(name, mattr=attributes, **options)
