"""The second stage: ONNX graphs to a compiled library and an artifact, with TVM."""
