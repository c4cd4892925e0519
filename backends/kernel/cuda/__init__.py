"""Kernels for NVIDIA GPUs: weights as panels, multiplied by the sparse tensor cores."""
