// y = activation(W x + bias) for few tokens: W as panels, x as [tokens][cols]. See device.cuh for the macros, and
//   WARPS   warps of a thread block
//   PANELS  panels of a thread block
//
// Weights are read once, and nothing else takes as long. So every warp takes whole steps of its own: step after step it
// loads the weights of the next while it multiplies, and copies the window of each token, 16 M columns, to shared
// memory that no other warp reads. A lane picks its gathered columns there, two at a time. The sums of the warps are
// added in their order; so are those of the thread blocks that share rows (grid x), by the last of them to finish. It
// finds out by `tickets`: one counter for each place along grid y, 0 before and after. Results do not depend on timing.
// Tokens beyond `tokens` are computed from whatever is there, and not stored.
#include "device.cuh"

constexpr int THREADS = 32 * WARPS;
constexpr int TILES = 4 * PANELS;                         // of 16 rows
constexpr int CHUNKS = TOKENS / 8;
constexpr int PITCH = 32 * WINDOW + 16;                   // bytes from a token to the next: 8 of them lie in 8 banks
constexpr int STAGE = TOKENS * PITCH;
constexpr int ROWS = 64 * PANELS, SUMS = ROWS * TOKENS;   // of a thread block
static_assert(WINDOW, "columns from anywhere have no window");

extern "C" __global__ void __launch_bounds__(THREADS)
decode(const uint4* __restrict__ values, const uint4* __restrict__ metadata, const uint16_t* __restrict__ index,
       const int* __restrict__ rows, const uint16_t* __restrict__ x, const uint16_t* __restrict__ bias,
       float* __restrict__ partial, uint32_t* __restrict__ tickets, uint16_t* __restrict__ y, uint32_t row_count,
       int cols, int tokens, int64_t x_stride, int64_t y_token_stride, int64_t y_row_stride, int panels, int steps,
       int splits) {
    SHARED_MEMORY(memory);
    const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5, group = lane >> 2, pair = lane & 3;
    const int split = blockIdx.x, block_panel = blockIdx.y * PANELS;
    const int begin = (int)((int64_t)steps * split / splits), end = (int)((int64_t)steps * (split + 1) / splits);
    uint8_t* const own = memory + warp * STAGES * STAGE;
    const uint32_t own_address = shared_address(own);

    const auto copy_step = [&](int step, int stage) {
        if (step < end)
            for (int i = lane; i < tokens * 2 * WINDOW; i += 32) {
                const int token = i / (2 * WINDOW), piece = i % (2 * WINDOW);
                const int col = step * 16 * WINDOW + piece * 8, left = cols - col;
                const int bytes = left >= 8 ? 16 : left > 0 ? 2 * left : 0;
                const uint16_t* from = bytes ? x + token * x_stride + col : x;
                copy16(own_address + stage * STAGE + token * PITCH + piece * 16, from, bytes);
            }
        commit();
    };
    struct Unit {  // the weights of a panel and step
        uint4 halves[2][4], marks;
        uint32_t places[BLOCKS];
    } unit, next;
    const auto load = [&](Unit& to, int step, int p) {
        const int panel = block_panel + p < panels ? block_panel + p : panels - 1;  // the rest is not stored
        const int64_t at = (int64_t)panel * steps + (step < end ? step : end - 1);
#pragma unroll
        for (int i = 0; i < 8; ++i) to.halves[i / 4][i % 4] = stream16(values + at * 256 + i * 32 + lane);
        to.marks = stream16(metadata + at * 32 + lane);
#pragma unroll
        for (int b = 0; b < BLOCKS; ++b) to.places[b] = index[(at * BLOCKS + b) * 32 + lane];
    };

    float sums[TILES][CHUNKS][4];
#pragma unroll
    for (int m = 0; m < TILES; ++m)
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[m][c][i] = 0.f;

    const auto multiply_half = [&](auto selector, const uint8_t* stage, int p) {
        constexpr int HALF = decltype(selector)::value;
#pragma unroll
        for (int block = 0; block < BLOCKS; ++block) {
            const uint16_t* at[8];  // where this lane's columns lie, of the first 8 tokens
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const uint32_t two = of_lane(unit.places[block], 16 * HALF + 4 * i + pair);
                at[2 * i] = (const uint16_t*)(stage + group * PITCH) + (two & 255);
                at[2 * i + 1] = (const uint16_t*)(stage + group * PITCH) + (two >> 8);
            }
#pragma unroll
            for (int c = 0; c < CHUNKS; ++c) {
                uint32_t b[4];
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    b[i] = at[2 * i][c * 4 * PITCH] | (uint32_t)at[2 * i + 1][c * 4 * PITCH] << 16;
#pragma unroll
                for (int m = block * 4 / BLOCKS; m < (block + 1) * 4 / BLOCKS; ++m) {
                    multiply<HALF>(sums[4 * p + m][c], unit.halves[HALF][m], b, of_tile(unit.marks, m));
                }
            }
        }
    };
    if (begin + warp < end) load(unit, begin + warp, 0);
    for (int s = 0; s < STAGES - 1; ++s) copy_step(begin + warp + s * WARPS, s);
    int stage = 0;
    for (int step = begin + warp; step < end; step += WARPS) {
        wait<STAGES - 2>();
        __syncwarp();  // the copies of all lanes are there, and no lane reads the stage that is filled next
        copy_step(step + (STAGES - 1) * WARPS, (stage + STAGES - 1) % STAGES);
#pragma unroll
        for (int p = 0; p < PANELS; ++p) {
            load(next, p + 1 < PANELS ? step : step + WARPS, (p + 1) % PANELS);
            multiply_half(Half<0>(), own + stage * STAGE, p);
            multiply_half(Half<1>(), own + stage * STAGE, p);
            unit = next;
        }
        stage = (stage + 1) % STAGES;
    }

    float* const added = (float*)memory;  // [warps][tiles][chunks][4][32 lanes]
    __syncthreads();  // nobody reads activations any more
#pragma unroll
    for (int m = 0; m < TILES; ++m)
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                added[warp * SUMS + ((m * CHUNKS + c) * 4 + i) * 32 + lane] = sums[m][c][i];
    __syncthreads();
    const auto store = [&](int row_of_block, int token, float sum) {
        const uint32_t row = output_row(rows, block_panel * 64 + row_of_block, panels);
        if (row < row_count && token < tokens) {
            const float shift = bias ? to_float(bias[row]) : 0.f;
            y[token * y_token_stride + row * y_row_stride] = (uint16_t)to_pair(activated(sum + shift), 0.f);
        }
    };
    float* const shared_rows = partial + (int64_t)blockIdx.y * splits * SUMS;  // [splits][tokens][rows]
    for (int i = thread; i < SUMS; i += THREADS) {
        const int r = i % ROWS, token = i / ROWS;
        const int holder = r % 8 * 4 + token % 8 / 2;  // the lane that has the sum, in place `place` of its own
        const int place = (r / 16 * CHUNKS + token / 8) * 4 + r % 16 / 8 * 2 + token % 2, at = place * 32 + holder;
        float sum = 0.f;
        for (int w = 0; w < WARPS; ++w) sum += added[w * SUMS + at];
        if (splits == 1) store(r, token, sum);
        else shared_rows[(int64_t)split * SUMS + i] = sum;
    }
    if (splits == 1) return;
    __threadfence();
    __syncthreads();
    uint32_t* const ticket = (uint32_t*)memory;
    if (thread == 0) *ticket = atomicAdd(tickets + blockIdx.y, 1u);
    __syncthreads();
    if (*ticket != splits - 1) return;
    __threadfence();
    for (int i = thread; i < SUMS; i += THREADS) {
        float sum = 0.f;
        for (int s = 0; s < splits; ++s) sum += __ldcg(shared_rows + (int64_t)s * SUMS + i);
        store(i % ROWS, i / ROWS, sum);
    }
    if (thread == 0) tickets[blockIdx.y] = 0;
}
