"""Arrays as onnxruntime takes them: a dtype that numpy lacks is handed over by its bits."""

from typing import Any

import onnx
import onnxruntime
from numpy.typing import NDArray

from runtime.artifact.tensor_file import BITS, numpy_dtype


def ort_value(array: NDArray[Any], dtype: str) -> onnxruntime.OrtValue:
    """A tensor of a stored dtype over an array of `bits_dtype(dtype)`, whose memory it shares and does not keep."""
    if dtype not in BITS:
        return onnxruntime.OrtValue.ortvalue_from_numpy(array)
    element = onnx.helper.np_dtype_to_tensor_dtype(numpy_dtype(dtype))
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, element)
