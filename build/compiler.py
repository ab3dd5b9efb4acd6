"""The one place that imports TVM's compiler, without torch: `tvm_ffi` would import an installed torch, a second and 200 MB for nothing."""

import inspect
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

from tvm import relax
from tvm.relax.frontend.onnx import from_onnx
from tvm.script.parser.core.parser import ScriptMacro
from tvm.support import cc
from tvm.target import codegen

__all__ = ["cc", "codegen", "from_onnx", "relax", "tvm"]


def _parser_of_caller(_: ScriptMacro) -> Any:  # noqa: ANN401 (TVM's parser)
    """The parser that an inline function is called from: in the globals of a frame of the stack.

    TVM's own way reads the source line of every frame first, which is two thirds of the time that it takes to parse our kernels.
    """
    frame = inspect.currentframe()
    while frame is not None:
        parser = frame.f_globals.get(ScriptMacro.parser_object_name)
        if parser is not None:
            return parser
        frame = frame.f_back
    raise RuntimeError("an inline function of TVMScript was called outside a kernel")


ScriptMacro._find_parser_def = _parser_of_caller
