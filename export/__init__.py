"""The first stage: makes static prefill and decode graphs in ONNX from YAML and a checkpoint, and proves them."""
