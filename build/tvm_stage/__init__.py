"""From ONNX graphs to a compiled library, with TVM."""
