"""CPU kernels for N:M and V:N:M linear layers: one native library, AVX-512, AVX2 or portable, chosen at run time."""
