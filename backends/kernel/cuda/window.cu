// y = activation(W x + bias) for many tokens: gemm.cu, sum for sum, for GPUs whose copies need no threads (Hopper).
// See device.cuh and tile.cuh for the macros, and
//   CLUSTER_M, CLUSTER_N  thread blocks of a cluster, along rows and tokens
//
// One thread asks for all copies: of every step the window of activations, 16 M lines, and the values, metadata and
// indices of the thread block's panels. The rest of its group of warps only gives its registers to those that multiply.
// Copies cross from L2 once for a cluster: its thread blocks of the same tokens each copy a share of the window to all
// of them, those of the same rows each a share of the panels. A stage is full when the bytes of all of them are there,
// and empty when every warp of the cluster has multiplied it.
// The arguments are gemm.cu's; the matrix of activations is in `x`, its size and stride too.
#include "device.cuh"
#include "tile.cuh"
#include "tma.cuh"

constexpr int THREADS = WORKERS + 128;
constexpr int CLUSTER = CLUSTER_M * CLUSTER_N;
constexpr int LINES = 16 * WINDOW, SHARE = LINES / CLUSTER_M;   // of a window, of a thread block's part of it
constexpr int SLICES = TOKENS / 64, SLICE = LINES * 128;        // of 64 tokens; bytes of one
constexpr int TABLES = WARPS_M * PANELS;                        // panels of a thread block
constexpr int VALUES = 4096, METADATA = 512, INDEX = 64;        // bytes of a panel and step
constexpr int PANEL_BYTES = VALUES + METADATA + INDEX;
constexpr int STEP_BYTES = SLICES * SLICE + TABLES * PANEL_BYTES;
constexpr int STAGE = (STEP_BYTES + 1023) / 1024 * 1024;        // swizzled lines begin at a multiple of 1024
static_assert(WORKERS % 128 == 0, "registers move between groups of 4 warps");
static_assert(WINDOW && BLOCKS == 1, "a panel reads a window at its own columns");
static_assert(SHARE % 8 == 0 && SHARE * CLUSTER_M == LINES, "a share begins where the swizzle does");
static_assert(TOKENS % 64 == 0, "whole slices");
static_assert(TURNED_BYTES <= STAGES * STAGE, "results must not lie over barriers, where others still arrive");

extern "C" __global__ void __cluster_dims__(CLUSTER_N, CLUSTER_M, 1) __launch_bounds__(THREADS, 1)
window(const uint4* __restrict__ values, const uint4* __restrict__ metadata, const uint8_t* __restrict__ index,
       const int* __restrict__ rows, const __grid_constant__ TensorMap x, const uint16_t* __restrict__ bias,
       uint16_t* __restrict__ y, uint32_t row_count, int cols, int tokens, int64_t x_stride, int64_t y_stride,
       int panels, int steps) {
    SHARED_MEMORY(memory);
    const uint32_t shared = shared_address(memory), full = shared + STAGES * STAGE, empty = full + 8 * STAGES;
    const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
    const int first_token = blockIdx.x * TOKENS, block_panel = blockIdx.y * TABLES;
    if (thread == 0) {
        for (int s = 0; s < STAGES; ++s) {
            init_barrier(full + 8 * s, 1);
            init_barrier(empty + 8 * s, WORKERS / 32 * CLUSTER);
        }
        publish_barriers();
    }
    sync_cluster();  // nobody copies to, or arrives at, what has no barriers yet

    int stage = 0;
    uint32_t parity = 0;  // of the stage's phase: 0 in the first round, 1 in the second
    const auto next_stage = [&] {
        stage = stage + 1 < STAGES ? stage + 1 : 0;
        parity ^= stage == 0;
    };
    if (thread >= WORKERS) {
        give_registers<40>();
        const int asked = thread == WORKERS ? steps : 0;  // by one thread
        const int n = blockIdx.x % CLUSTER_N, m = blockIdx.y % CLUSTER_M;
        uint16_t same_tokens = 0, same_rows = ((1 << CLUSTER_N) - 1) << (m * CLUSTER_N);
        for (int i = 0; i < CLUSTER_M; ++i) same_tokens |= 1 << (i * CLUSTER_N + n);
#pragma unroll 1
        for (int step = 0; step < asked; ++step) {
            const uint32_t to = shared + stage * STAGE, arrived = full + 8 * stage;
            wait_phase(empty + 8 * stage, parity ^ 1);  // of the round before; true at once in the first
            arrive_and_expect(arrived, STEP_BYTES);     // from all who copy here
            for (int s = 0; s < SLICES; ++s)
                copy_box(to + s * SLICE + m * SHARE * 128, x, first_token + s * 64, step * LINES + m * SHARE, arrived,
                         same_tokens);
            for (int p = n; p < TABLES; p += CLUSTER_N) {
                const int panel = block_panel + p < panels ? block_panel + p : panels - 1;  // the rest is not stored
                const int64_t at = (int64_t)panel * steps + step;
                const uint32_t to_panel = to + SLICES * SLICE + p * PANEL_BYTES;
                copy_run(to_panel, (const uint8_t*)values + at * VALUES, VALUES, arrived, same_rows);
                copy_run(to_panel + VALUES, (const uint8_t*)metadata + at * METADATA, METADATA, arrived, same_rows);
                copy_run(to_panel + VALUES + METADATA, index + at * INDEX, INDEX, arrived, same_rows);
            }
            next_stage();
        }
    } else {
        take_registers<232>();
        float sums[TILES][CHUNKS][4];
        clear(sums);
        const int first_chunk = warp % WARPS_N * CHUNKS, first_table = warp / WARPS_N * PANELS;
        uint4 marks[PANELS];
        const auto multiply_half = [&](auto selector, const uint8_t* own, uint32_t lines) {
            constexpr int HALF = decltype(selector)::value;
            const int line = own[VALUES + METADATA + 32 * HALF + lane];
            uint4 half[TILES];
#pragma unroll
            for (int m = 0; m < TILES; ++m)
                half[m] = *(const uint4*)(own + m / 4 * PANEL_BYTES + HALF * 2048 + m % 4 * 512 + lane * 16);
#pragma unroll
            for (int c = 0; c < CHUNKS; ++c) {
                const int piece = first_chunk + c;
                uint32_t b[4];
                load_transposed(b, lines + piece / 8 * SLICE + line * 128 + (piece % 8 ^ (line & 7)) * 16);
#pragma unroll
                for (int m = 0; m < TILES; ++m) multiply<HALF>(sums[m][c], half[m], b, of_tile(marks[m / 4], m % 4));
            }
        };
#pragma unroll 1
        for (int step = 0; step < steps; ++step) {
            const uint8_t* own = memory + stage * STAGE + SLICES * SLICE + first_table * PANEL_BYTES;
            wait_phase(full + 8 * stage, parity);
#pragma unroll
            for (int p = 0; p < PANELS; ++p) marks[p] = *(const uint4*)(own + p * PANEL_BYTES + VALUES + lane * 16);
            multiply_half(Half<0>(), own, shared + stage * STAGE);
            multiply_half(Half<1>(), own, shared + stage * STAGE);
            __syncwarp();  // all lanes have read
            if (lane < CLUSTER) arrive_at(empty + 8 * stage, lane);
            next_stage();
        }
        store({rows, bias, y, row_count, tokens, y_stride, panels}, sums, memory, block_panel, first_token);
    }
    sync_cluster();  // nobody arrives any more at a thread block that ends
}
