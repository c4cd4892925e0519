"""2:4 layers on torch's own semi-structured CUDA kernels."""
