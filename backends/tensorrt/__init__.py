"""TensorRT: an engine that may use 2:4 kernels, from the dense ONNX file; what it uses is read from the build log."""
