// What limits the kernels on a GPU, one limit a program. See device.cuh for the other macros;
//   LIMIT  0  mma.sp, as the kernels use it       1  the same without sparsity
//          2  ldmatrix of lines at gathered places of shared memory, as gemm.cu reads its window
//          3  reads from the L2 cache: `input` fits it
//          4  reads from memory: `input` is far larger than the L2 cache
// `output` takes what would otherwise be dead code: one number of each thread. `size`: 16-byte pieces of `input`.
// Programs 0 to 2 read inputs that are random: power, and with it the clock, depends on what is multiplied.
#include "device.cuh"

constexpr int THREADS = 512;
constexpr int CHAINS = 16;  // sums of a warp that do not wait for each other
constexpr int LINE = 128, LINES = 256;

#if LIMIT == 1
__device__ __forceinline__ void multiply_dense(float (&d)[4], const uint4& a, const uint32_t (&b)[4]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                 "{%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b[0]), "r"(b[1]));
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS)
ceilings(const uint4* __restrict__ input, const uint8_t* __restrict__ places, float* __restrict__ output,
         int64_t size, int repeats, int blocks) {
    const int thread = threadIdx.x, lane = thread & 31;
    const int64_t global = (int64_t)blockIdx.x * THREADS + thread, threads = (int64_t)blocks * THREADS;
#if LIMIT <= 1
    float sums[CHAINS][4] = {};
    uint4 a[4];
    uint32_t b[4][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        a[i] = input[(global + i * threads) % size];
        const uint4 four = input[(global + (4 + i) * threads) % size];
        b[i][0] = four.x, b[i][1] = four.y, b[i][2] = four.z, b[i][3] = four.w;
    }
    for (int r = 0; r < repeats; ++r)
#pragma unroll
        for (int i = 0; i < CHAINS; ++i)
#if LIMIT == 0
            multiply<0>(sums[i], a[i / 4], b[i % 4], 0x4e4e4e4eu);
#else
            multiply_dense(sums[i], a[i / 4], b[i % 4]);
#endif
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < CHAINS; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sum += sums[i][j];
    output[global] = sum;
#elif LIMIT == 2
    SHARED_MEMORY(memory);  // LINES lines of 64 numbers, swizzled as in gemm.cu
    for (int i = thread; i < LINES * LINE / 16; i += THREADS) ((uint4*)memory)[i] = input[i % size];
    __syncthreads();
    const uint32_t shared = shared_address(memory);
    uint32_t sum = 0;
    for (int r = 0; r < repeats; ++r) {
        const int line = places[(r + thread / 32) % 64 * 32 + lane];  // 64 sets of 32 places
#pragma unroll
        for (int piece = 0; piece < 8; ++piece) {
            uint32_t found[4];
            load_transposed(found, shared + line * LINE + (piece ^ (line & 7)) * 16);
            sum ^= found[0] ^ found[1] ^ found[2] ^ found[3];
        }
    }
    output[global] = (float)sum;
#else
    uint32_t sum = 0;
    for (int r = 0; r < repeats; ++r)  // every round another block reads a piece: none finds it in a cache of its own
#pragma unroll 4
        for (int64_t i = (int64_t)((blockIdx.x + 7 * r) % blocks) * THREADS + thread; i < size; i += threads) {
            const uint4 found = stream16(input + i);
            sum ^= found.x ^ found.y ^ found.z ^ found.w;
        }
    output[global] = (float)sum;
#endif
}
