"""The backends, one package each. To add one: its package here, its line in TABLE, its tests in tests/backends."""

if __name__ != "sparsec.backends":
    raise ImportError("backends/ is imported as sparsec.backends; install the project (make dev) and import that")

TABLE = {
    "kernel": "sparsec.backends.kernel.backend:KernelBackend",
    "hf": "sparsec.backends.hf.backend:HfBackend",
    "onnx": "sparsec.backends.onnx.backend:OnnxBackend",
    "tensorrt": "sparsec.backends.tensorrt.backend:TensorRTBackend",
    "torch24": "sparsec.backends.torch24.backend:Torch24Backend",
}
