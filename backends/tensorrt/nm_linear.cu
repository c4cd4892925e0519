// y = x W^T + bias for a weight in sparsec's canonical tables (N:M and V:N:M; sparsec/layout.py), on any NVIDIA GPU.
//
// A plain kernel, written to be read and checked: a thread takes one row and TOKENS tokens, unpacks each kept weight's
// column once and multiplies it with TOKENS activations. It uses no tensor cores. Faster kernels keep this interface.
//
// Compiled once for each choice of types, with -DELEMENT= and -DVALUE= one of float, Half, Bfloat16, and -DTABLE=
// unsigned char or int (TensorRT's ONNX parser widens uint8 tables). TensorRT passes inputs, integers, then the output.
// It includes nothing, so that NVRTC can compile it by itself.

struct Half { unsigned short bits; };
struct Bfloat16 { unsigned short bits; };

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(Bfloat16 value) { return __uint_as_float((unsigned)value.bits << 16); }
__device__ inline void round_to(float value, float& rounded) { rounded = value; }
__device__ inline void round_to(float value, Bfloat16& rounded) {  // to nearest even; NaN stays NaN
    const unsigned bits = __float_as_uint(value), finite = bits + 0x7fff + (bits >> 16 & 1);
    rounded.bits = (bits & 0x7fffffff) > 0x7f800000 ? 0x7fff : (unsigned short)(finite >> 16);
}
#ifdef HOST_EMULATION
inline float to_float(Half value) { return host_half_to_float(value.bits); }
inline void round_to(float value, Half& rounded) { rounded.bits = host_float_to_half(value); }
#else
__device__ inline float to_float(Half value) {
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
    return wide;
}
__device__ inline void round_to(float value, Half& rounded) {
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(rounded.bits) : "f"(value));
}
#endif

constexpr int ROWS = 128;  // threads of a block, one row each
constexpr int TOKENS = 8;  // a thread's

// x (tokens, cols); values (rows, groups, n); positions (rows, bytes), bits each, from the least significant bit on;
// columns (strips, groups, 4) for V:N:M, v > 0, unused for N:M, v == 0; bias (rows); y (tokens, rows).
// Grid: ceil(tokens / TOKENS) x ceil(rows / ROWS) blocks of ROWS threads.
extern "C" __global__ void nm_linear(const ELEMENT* __restrict__ x, const VALUE* __restrict__ values,
                                     const TABLE* __restrict__ positions, const TABLE* __restrict__ columns,
                                     const ELEMENT* __restrict__ bias, int tokens, int rows, int cols, int groups,
                                     int v, int n, int m, int bits, ELEMENT* __restrict__ y) {
    const int row = (int)(blockIdx.y * ROWS + threadIdx.x), first = (int)blockIdx.x * TOKENS;
    if (row >= rows) return;
    const int bytes = (groups * n * bits + 7) / 8, count = tokens - first < TOKENS ? tokens - first : TOKENS;
    const TABLE* packed = positions + (long long)row * bytes;
    const TABLE* shared = columns + (v ? (long long)(row / v) * groups * 4 : 0);
    const VALUE* kept = values + (long long)row * groups * n;
    float sums[TOKENS] = {};
    for (int group = 0; group < groups; ++group) {
        for (int slot = 0; slot < n; ++slot) {
            const int bit = (group * n + slot) * bits, byte = bit / 8;
            unsigned word = bits ? (unsigned)packed[byte] : 0;
            if (bit % 8 + bits > 8) word |= (unsigned)packed[byte + 1] << 8;
            const int position = (int)(word >> bit % 8 & ((1u << bits) - 1));
            const int column = group * m + (v ? (int)shared[group * 4 + position] : position);
            if (column >= cols) continue;  // a spare slot of an N:M tail
            const float weight = to_float(kept[group * n + slot]);
            for (int token = 0; token < count; ++token)
                sums[token] += weight * to_float(x[(long long)(first + token) * cols + column]);
        }
    }
    for (int token = 0; token < count; ++token)
        round_to(sums[token] + to_float(bias[row]), y[(long long)(first + token) * rows + row]);
}
