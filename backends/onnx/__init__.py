"""The ONNX backend: one model.onnx that any runtime reads."""
