// What the kernels are written in: PTX as functions, 16-bit numbers, activations. CUDA C++ for NVRTC, sm_80 and later.
// tests/native/cuda_fibers.h has the same functions for CPUs, and defines ON_CPU.
//
// Macros of all kernels:
//   WINDOW      M of the pattern's window of columns, 4..16; 0: columns come from anywhere
//   BLOCKS      blocks of rows with columns of their own in a panel of 64 rows: 1, 2, 4
//   TOKENS      tokens of a thread block, a multiple of 8
//   STAGES      steps of activations in flight, the one that is multiplied included
//   FP16        1: fp16, 0: bf16; of activations, weights, bias and results
//   ACTIVATION  0 none, 1 relu, 2 gelu, 3 gelu_tanh, 4 silu
//   MOVED       1: the table `rows` says where a row of the tables goes
#pragma once

#ifndef ON_CPU
#ifdef __CUDACC_RTC__  // NVRTC has no headers
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
#else
#include <cstdint>
#endif

#define SHARED_MEMORY(name) extern __shared__ __align__(1024) uint8_t name[]

__device__ __forceinline__ uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

// Copies `bytes` to shared memory, and zeros up to 16; they are there for this thread after `wait` for their group.
__device__ __forceinline__ void copy16(uint32_t to, const void* from, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT> __device__ __forceinline__ void wait() {  // until at most LEFT groups are in flight
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

template <int THREADS> __device__ __forceinline__ void meet() {  // of the thread block's first THREADS
    asm volatile("barrier.sync 1, %0;" ::"n"(THREADS) : "memory");
}

__device__ __forceinline__ uint4 stream16(const uint4* p) {  // weights are read once
    uint4 r;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "l"(p));
    return r;
}

// Four 8 x 8 matrices, transposed; lane 8 i + j says where row j of matrix i begins.
__device__ __forceinline__ void load_transposed(uint32_t (&b)[4], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3]) : "r"(row) : "memory");
}

__device__ __forceinline__ uint32_t of_lane(uint32_t value, int lane) {
    return __shfl_sync(0xffffffff, value, lane);
}

#if FP16
#define NUMBER "f16"
#else
#define NUMBER "bf16"
#endif
// d += A B for 16 rows, 32 gathered columns and 8 tokens; A holds 2 of every 4 columns, as metadata half SELECTOR says.
template <int SELECTOR>
__device__ __forceinline__ void multiply(float (&d)[4], const uint4& a, const uint32_t (&b)[4], uint32_t metadata) {
    asm volatile("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32." NUMBER "." NUMBER ".f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9,%10,%11}, {%0,%1,%2,%3}, %12, %13;"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(metadata),
                   "n"(SELECTOR));
}
#undef NUMBER

__device__ __forceinline__ uint32_t to_pair(float low, float high) {  // rounded to nearest even
    uint32_t pair;
#if FP16
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#endif
    return pair;
}
__device__ __forceinline__ float to_float(uint16_t bits) {
#if FP16
    float number;
    asm("cvt.f32.f16 %0, %1;" : "=f"(number) : "h"(bits));
    return number;
#else
    return __uint_as_float((uint32_t)bits << 16);
#endif
}
#endif  // ON_CPU

// The metadata of one of a panel's 4 tiles.
__device__ __forceinline__ uint32_t of_tile(const uint4& marks, int tile) {
    return tile == 0 ? marks.x : tile == 1 ? marks.y : tile == 2 ? marks.z : marks.w;
}

template <int N> struct Half {
    static constexpr int value = N;
};

__device__ __forceinline__ float activated(float x) {
#if ACTIVATION == 1
    return x < 0.f ? 0.f : x;  // NaN stays
#elif ACTIVATION == 2
    return 0.5f * x * (1.f + erff(0.70710678f * x));
#elif ACTIVATION == 3
    return 0.5f * x * (1.f + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
#elif ACTIVATION == 4
    return x / (1.f + expf(-x));
#else
    return x;
#endif
}

// The row of the result for row `r` of the tables; not below the number of rows if there is none.
__device__ __forceinline__ uint32_t output_row(const int* rows, int r, int panels) {
#if MOVED
    return r < 64 * panels ? (uint32_t)rows[r] : ~0u;
#else
    return (uint32_t)r;
#endif
}
