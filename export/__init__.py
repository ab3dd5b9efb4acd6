"""The first stage: YAML and checkpoint to static prefill and decode graphs in ONNX, proved with onnxruntime."""
