"""The GPU kernels on a real GPU: python -m tests.bench.gpu (see __main__.py)."""
