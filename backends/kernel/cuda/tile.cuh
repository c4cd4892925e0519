// What gemm.cu and window.cu share: how a thread block's sums lie in its warps, and how they are stored. Macros:
//   WARPS_M, WARPS_N  warps that multiply, along rows and tokens
//   PANELS            panels of a warp; 2 needs V a multiple of 128: both read the same activations
//   BY_TOKEN          1: y is [tokens][rows], 0: [rows][tokens]; y_stride elements from one line to the next
// A warp multiplies TILES x CHUNKS tiles of 16 rows and 8 tokens; a lane has 4 sums of each, as `multiply` leaves them.
#pragma once
#include "device.cuh"

constexpr int WORKERS = 32 * WARPS_M * WARPS_N;  // threads that multiply
constexpr int TILES = 4 * PANELS;                // of 16 rows, a warp
constexpr int CHUNKS = TOKENS / WARPS_N / 8;     // of 8 tokens, a warp
constexpr int BLOCK_ROWS = 64 * PANELS * WARPS_M;
constexpr int TURNED = BLOCK_ROWS + 8;           // of the results by token; 8 keep banks apart
constexpr int TURNED_BYTES = BY_TOKEN ? 2 * TOKENS * TURNED : 0;
static_assert(TOKENS % (8 * WARPS_N) == 0, "whole tiles");

struct Results {  // where they go
    const int* rows;
    const uint16_t* bias;
    uint16_t* y;
    uint32_t row_count;
    int tokens;
    int64_t y_stride;
    int panels;
};

__device__ __forceinline__ void clear(float (&sums)[TILES][CHUNKS][4]) {
#pragma unroll
    for (int m = 0; m < TILES; ++m)
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[m][c][i] = 0.f;
}

// Called by all workers; `memory` has TURNED_BYTES that the others may still read before they call.
__device__ __forceinline__ void store(const Results& to, const float (&sums)[TILES][CHUNKS][4], uint8_t* memory,
                                      int block_panel, int first_token) {
    const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
    const int group = lane >> 2, pair = lane & 3;
    const int panel = block_panel + warp / WARPS_N * PANELS;
#if BY_TOKEN
    uint16_t* turned = (uint16_t*)memory;
    meet<WORKERS>();  // nobody reads the last stages any more
#endif
#pragma unroll
    for (int m = 0; m < TILES; ++m)
#pragma unroll
        for (int high = 0; high < 2; ++high) {
            const int r = (panel + m / 4) * 64 + m % 4 * 16 + high * 8 + group;
            const uint32_t row = output_row(to.rows, r, to.panels);
            if (row >= to.row_count) continue;
            const float shift = to.bias ? to_float(to.bias[row]) : 0.f;
#pragma unroll
            for (int c = 0; c < CHUNKS; ++c) {
                const int token = (warp % WARPS_N * CHUNKS + c) * 8 + 2 * pair;
                const float* sum = sums[m][c] + 2 * high;
                const uint32_t both = to_pair(activated(sum[0] + shift), activated(sum[1] + shift));
#if BY_TOKEN
                turned[token * TURNED + r - block_panel * 64] = (uint16_t)both;
                turned[(token + 1) * TURNED + r - block_panel * 64] = (uint16_t)(both >> 16);
#else
                if (first_token + token < to.tokens)  // the second may be one beyond: y_stride is even
                    *(uint32_t*)(to.y + row * to.y_stride + first_token + token) = both;
#endif
            }
        }
#if BY_TOKEN
    meet<WORKERS>();
    const bool wide = !MOVED && to.y_stride % 8 == 0;
    for (int i = thread; i < TOKENS * BLOCK_ROWS / 8; i += WORKERS) {
        const int token = i / (BLOCK_ROWS / 8), r = i % (BLOCK_ROWS / 8) * 8, first_row = block_panel * 64 + r;
        if (first_token + token >= to.tokens) break;
        uint16_t* line = to.y + (first_token + token) * to.y_stride;
        const uint16_t* from = turned + token * TURNED + r;
        if (wide && first_row + 8 <= to.row_count) {
            *(uint4*)(line + first_row) = *(const uint4*)from;
            continue;
        }
        for (int j = 0; j < 8; ++j) {
            const uint32_t row = output_row(to.rows, first_row + j, to.panels);
            if (row < to.row_count) line[row] = from[j];
        }
    }
#endif
}
