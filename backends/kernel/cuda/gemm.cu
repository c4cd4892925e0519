// y = activation(W x + bias) for many tokens: W as panels, x as [cols][tokens]. See device.cuh and tile.cuh for the
// macros.
//
// A thread block computes WARPS_M * PANELS panels for TOKENS tokens, one step after the other. Of every step it copies
// the dense window of activations, 16 M lines, to shared memory once for all its warps, three stages deep; ldmatrix
// then gathers columns by taking each line's address from its lane. Where columns come from anywhere, the gathered
// lines themselves are copied, 64 for each block of rows; their indices are copied one round earlier.
// 16-byte pieces of a line are swizzled, so that 8 lines below each other lie in different banks.
// Reads up to 7 tokens beyond `tokens` (x_stride is a multiple of 8), into results that are not stored.
#include "device.cuh"
#include "tile.cuh"

constexpr int THREADS = WORKERS;
constexpr int PIECES = TOKENS / 8, LINE = TOKENS * 2;      // of a line: pieces of 16 bytes, bytes
constexpr int TABLES = WARPS_M * BLOCKS;                   // tables of 64 indices, a step
constexpr int LINES = WINDOW ? 16 * WINDOW : 64 * TABLES;  // of a stage
constexpr int INDEX = 64 * TABLES * (WINDOW ? 1 : 4);      // bytes of indices, a step
constexpr int INDEX_AHEAD = WINDOW ? 0 : STAGES - 1;       // steps that indices are copied before their lines
constexpr int INDEX_STAGES = STAGES + INDEX_AHEAD;
constexpr int AT_ONCE = THREADS / PIECES;                  // lines that all threads copy at once
static_assert(PANELS == 1 || BLOCKS == 1, "panels of a warp share their columns");
static_assert(AT_ONCE >= 8 && AT_ONCE % 8 == 0, "a thread's lines have the same swizzle");
static_assert(TILES % BLOCKS == 0, "whole tiles");

// Where a piece of a line lies, in pieces.
__device__ __forceinline__ int swizzled(int line, int piece) {
    if (PIECES >= 8) return piece ^ (line & 7);
    if (PIECES == 4) return piece ^ (line >> 1 & 3);
    if (PIECES == 2) return piece ^ (line >> 2 & 1);
    return piece;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
gemm(const uint4* __restrict__ values, const uint4* __restrict__ metadata, const uint8_t* __restrict__ index,
     const int* __restrict__ rows, const uint16_t* __restrict__ x, const uint16_t* __restrict__ bias,
     uint16_t* __restrict__ y, uint32_t row_count, int cols, int tokens, int64_t x_stride, int64_t y_stride, int panels,
     int steps) {
    SHARED_MEMORY(memory);
    const uint32_t shared = shared_address(memory);
    const uint32_t index_shared = shared + STAGES * LINES * LINE;
    const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
    const int warp_m = warp / WARPS_N, warp_n = warp % WARPS_N;
    const int first_token = blockIdx.x * TOKENS;
    const int block_panel = blockIdx.y * WARPS_M * PANELS;
    const int panel = block_panel + warp_m * PANELS;
    const auto existing = [&](int p) { return p < panels ? p : panels - 1; };  // the rest computes what nobody stores

    const auto copy_index = [&](int step) {
        constexpr int EACH = INDEX / TABLES / 16;
        if (step >= steps) return;
#pragma unroll
        for (int i = thread; i < TABLES * EACH; i += THREADS) {
            const int table = i / EACH, piece = i % EACH;
            const int64_t p = existing(block_panel + table / BLOCKS * PANELS);
            const uint8_t* from = index + ((p * steps + step) * BLOCKS + table % BLOCKS) * (INDEX / TABLES);
            copy16(index_shared + step % INDEX_STAGES * INDEX + i * 16, from + piece * 16, 16);
        }
    };
    const int line = thread / PIECES, piece = thread % PIECES;
    const bool in_tokens = first_token + piece * 8 < tokens;
    const uint16_t* const x_piece = x + (in_tokens ? first_token + piece * 8 : 0);
    const uint32_t to = shared + line * LINE + swizzled(line, piece) * 16;
    const auto copy_step = [&](int step) {
        if (step < steps) {
            const uint32_t stage = to + step % STAGES * (LINES * LINE);
#if !WINDOW
            const int* from = (const int*)(memory + STAGES * LINES * LINE + step % INDEX_STAGES * INDEX);
#endif
#pragma unroll
            for (int i = 0; i < LINES; i += AT_ONCE) {
                if (LINES % AT_ONCE && line + i >= LINES) break;
#if WINDOW
                const int col = step * LINES + line + i;
#else
                const int col = from[line + i];
#endif
                const bool real = in_tokens && col < cols;
                copy16(stage + i * LINE, real ? x_piece + col * x_stride : x, real ? 16 : 0);
            }
        }
        copy_index(step + INDEX_AHEAD);
        commit();
    };

    float sums[TILES][CHUNKS][4];
    clear(sums);

    const uint4 *value_at[PANELS], *metadata_at[PANELS];
    uint4 first[TILES], second[TILES], marks[PANELS], next_marks[PANELS];
    const auto load_half = [&](uint4 (&half)[TILES], int offset) {
#pragma unroll
        for (int m = 0; m < TILES; ++m) half[m] = stream16(value_at[m / 4] + offset + m % 4 * 32);
    };
#pragma unroll
    for (int p = 0; p < PANELS; ++p) {
        value_at[p] = values + (int64_t)existing(panel + p) * steps * 256 + lane;
        metadata_at[p] = metadata + (int64_t)existing(panel + p) * steps * 32 + lane;
        marks[p] = stream16(metadata_at[p]);
    }
    load_half(first, 0);
    if (INDEX_AHEAD) {
        for (int s = 0; s < INDEX_AHEAD; ++s) copy_index(s);
        commit();
        wait<0>();
        __syncthreads();
    }
    for (int s = 0; s < STAGES - 1; ++s) copy_step(s);

    const auto multiply_half = [&](auto selector, int step, const uint4 (&half)[TILES]) {
        constexpr int HALF = decltype(selector)::value;
        uint32_t lines[BLOCKS];
        int of[BLOCKS];
#pragma unroll
        for (int b = 0; b < BLOCKS; ++b) {
            const int table = warp_m * BLOCKS + b, at = table * 64 + 32 * HALF + lane;
            of[b] = WINDOW ? memory[STAGES * LINES * LINE + step % INDEX_STAGES * INDEX + at] : at;
            lines[b] = shared + step % STAGES * (LINES * LINE) + of[b] * LINE;
        }
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c) {
            uint32_t b[4];
#pragma unroll
            for (int m = 0; m < TILES; ++m) {
                const int block = m * BLOCKS / TILES;
                if (m * BLOCKS % TILES == 0)
                    load_transposed(b, lines[block] + swizzled(of[block], warp_n * CHUNKS + c) * 16);
                multiply<HALF>(sums[m][c], half[m], b, of_tile(marks[m / 4], m % 4));
            }
        }
    };
    for (int step = 0; step < steps; ++step) {
        wait<STAGES - 2>();
        __syncthreads();  // all copies of this step are there, and nobody reads the stage that is filled next
        copy_step(step + STAGES - 1);
        load_half(second, 128);
        multiply_half(Half<0>(), step, first);
        const int more = step + 1 < steps;  // the last step loads its own weights again
#pragma unroll
        for (int p = 0; p < PANELS; ++p) {
            value_at[p] += more * 256, metadata_at[p] += more * 32;
            next_marks[p] = stream16(metadata_at[p]);
        }
        load_half(first, 0);
        multiply_half(Half<1>(), step, second);
#pragma unroll
        for (int p = 0; p < PANELS; ++p) marks[p] = next_marks[p];
    }

    store({rows, bias, y, row_count, tokens, y_stride, panels}, sums, memory, block_panel, first_token);
}
