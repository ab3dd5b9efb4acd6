"""Exports the static model as ONNX graphs over one shared weight file, with each weight as that file stores it."""
