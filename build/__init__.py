"""The second stage: turns ONNX graphs into a compiled library and an artifact, with TVM."""
