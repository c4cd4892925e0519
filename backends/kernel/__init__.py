"""The kernel backend: packed weights, run by sparsec's own kernels."""
