"""The static model as ONNX graphs over one shared weight file, and how that file stores each weight."""
