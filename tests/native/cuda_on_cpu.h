// Enough of CUDA to run a kernel without barriers on the CPU: one thread after the other. For tests.
#pragma once
#include <cstring>

#define HOST_EMULATION
#define __global__
#define __device__

struct Index { unsigned x, y, z; };
static Index blockIdx, threadIdx;

inline float __uint_as_float(unsigned bits) { float f; std::memcpy(&f, &bits, 4); return f; }
inline unsigned __float_as_uint(float f) { unsigned bits; std::memcpy(&bits, &f, 4); return bits; }
inline float host_half_to_float(unsigned short bits) { _Float16 half; std::memcpy(&half, &bits, 2); return (float)half; }
inline unsigned short host_float_to_half(float f) {
    _Float16 half = (_Float16)f; unsigned short bits; std::memcpy(&bits, &half, 2); return bits;
}

template <typename Kernel>
void launch(unsigned grid_x, unsigned grid_y, unsigned threads, Kernel kernel) {
    for (blockIdx.y = 0; blockIdx.y < grid_y; ++blockIdx.y)
        for (blockIdx.x = 0; blockIdx.x < grid_x; ++blockIdx.x)
            for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) kernel();
}
