// backends/kernel/cuda/device.cuh for CPUs: the threads of a cluster of blocks, most often one, are fibers, and the
// instructions of a warp wait for all its lanes. It finds what a GPU would hide or hang on:
//   shared memory begins as NaN and 255; every access to it is checked, global ones by AddressSanitizer
//   a copy lands as late as allowed, when its thread waits for it, or as early, when it is asked for (`early`);
//   what it will write is NaN and 255 until then
//   lanes, warps and blocks run in an order drawn from `seed`; a warp may run far ahead of the others
//   lanes that wait at different instructions, and threads that wait for ever, end the program
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <numeric>
#include <random>
#include <ucontext.h>
#include <vector>

#define ON_CPU
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __grid_constant__

struct uint4 { uint32_t x, y, z, w; };
struct Index { int x, y, z; };

namespace fibers {
struct Copy { uint32_t to; const void* from; int bytes; };
struct Fiber {
    ucontext_t context;
    char* stack;
    bool done;
    std::deque<std::vector<Copy>> groups;
    std::vector<Copy> open;
};
struct Lane { uint32_t a[4], b[4], metadata, row, value; };
struct Barrier { int waiting, round, instruction; };
struct Block { Index index; uint8_t* memory; Barrier everyone, some; int running; };

static Index thread_index, block_index;  // of the fiber that runs, as `memory` and `current`
static uint8_t* memory;
static uint32_t memory_size;
static int current, threads;  // fiber; of a block
static std::vector<Block> blocks;  // of a cluster
static std::vector<Fiber> all;
static std::vector<Lane> lanes;
static std::vector<Barrier> warps;
static ucontext_t scheduler;
static int progress;
static bool early;
static std::mt19937 random;
static std::function<bool()> between_rounds = [] { return false; };  // may let something land; says whether it did
static std::function<void()> at_begin = [] {}, at_end = [] {};       // of a cluster

[[noreturn]] inline void fail(const char* what) {
    std::fprintf(stderr, "block (%d, %d), thread %d: %s\n", block_index.x, block_index.y, thread_index.x, what);
    std::exit(1);
}
inline void check(uint32_t at, uint32_t size, uint32_t alignment) {
    if (at % alignment || at > memory_size || memory_size - at < size) fail("shared memory: outside, or not aligned");
}
inline void meet(Barrier& barrier, int count, int instruction) {
    if (barrier.waiting && barrier.instruction != instruction) fail("others wait at another instruction");
    barrier.instruction = instruction;
    ++progress;
    const int round = barrier.round;
    if (++barrier.waiting == count) {
        barrier.waiting = 0;
        ++barrier.round;
        return;
    }
    while (barrier.round == round) swapcontext(&all[current].context, &scheduler);
}
inline void meet_warp(int instruction) { meet(warps[current / 32], 32, instruction); }
inline Block& block() { return blocks[current / threads]; }
inline Lane* warp() { return &lanes[current / 32 * 32]; }
inline void land(const Copy& copy) {
    check(copy.to, 16, 16);
    std::memset(memory + copy.to, 0, 16);
    std::memcpy(memory + copy.to, copy.from, copy.bytes);
}

static std::function<void()> kernel;
inline void run_thread() {
    kernel();
    all[current].done = true;
    --block().running;
    ++progress;
    swapcontext(&all[current].context, &scheduler);
}
inline void enter(int fiber) {
    current = fiber;
    thread_index = {fiber % threads, 0, 0};
    block_index = block().index;
    memory = block().memory;
}
// Runs every lane, in any order, to where it waits; says how many have ended.
inline int step_warp(int warp) {
    int order[32], ended = 0;
    std::iota(order, order + 32, 32 * warp);
    std::shuffle(order, order + 32, random);
    for (int i : order) {
        if (all[i].done) continue;
        enter(i);
        swapcontext(&scheduler, &all[i].context);
        ended += all[i].done;
    }
    return ended;
}
inline void run_cluster() {  // of `blocks`
    constexpr size_t STACK = 128 << 10;
    const int count = threads * (int)blocks.size();
    for (auto& one : blocks) {
        std::memset(one.memory, 255, memory_size);
        one.everyone = one.some = Barrier{};
        one.running = threads;
    }
    all.assign(count, Fiber{});
    lanes.assign(count, Lane{});
    warps.assign(count / 32, Barrier{});
    for (auto& fiber : all) {
        getcontext(&fiber.context);
        fiber.stack = (char*)std::malloc(STACK);
        fiber.context.uc_stack.ss_sp = fiber.stack;
        fiber.context.uc_stack.ss_size = STACK;
        makecontext(&fiber.context, run_thread, 0);
    }
    at_begin();
    std::vector<int> of_warps(count / 32);
    std::iota(of_warps.begin(), of_warps.end(), 0);
    for (int left = count; left;) {
        const int before = progress;
        std::shuffle(of_warps.begin(), of_warps.end(), random);
        for (int warp : of_warps) {
            // One step of the warp, or many, at most as far as it comes without the others.
            for (int seen = progress - 1, steps = 1 << random() % 12; seen != progress && steps; --steps) {
                seen = progress;
                left -= step_warp(warp);
            }
        }
        if (!between_rounds() && left && progress == before) fail("waits for ever");
    }
    at_end();
    for (auto& fiber : all) std::free(fiber.stack);
}
inline void run(int grid_x, int grid_y, int block_threads, uint32_t shared_bytes, int seed, std::function<void()> body,
                int cluster_x = 1, int cluster_y = 1) {
    random.seed(seed);
    early = seed % 2;
    kernel = std::move(body);
    memory_size = shared_bytes;
    threads = block_threads;
    if (grid_x % cluster_x || grid_y % cluster_y) fail("the grid is not made of whole clusters");
    blocks.resize(cluster_x * cluster_y);
    for (auto& one : blocks) one.memory = (uint8_t*)std::aligned_alloc(1024, (shared_bytes + 1023) / 1024 * 1024);
    std::vector<int> order(grid_x * grid_y / (int)blocks.size());
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), random);
    for (int i : order) {
        const int x = i % (grid_x / cluster_x) * cluster_x, y = i / (grid_x / cluster_x) * cluster_y;
        for (int rank = 0; rank < (int)blocks.size(); ++rank)
            blocks[rank].index = {x + rank % cluster_x, y + rank / cluster_x, 0};
        run_cluster();
    }
    for (auto& one : blocks) std::free(one.memory);
}
}  // namespace fibers

#define threadIdx fibers::thread_index
#define blockIdx fibers::block_index
#define SHARED_MEMORY(name) uint8_t* const name = fibers::memory

inline void __syncthreads() { fibers::meet(fibers::block().everyone, fibers::threads, 1); }
template <int THREADS> void meet() {
    if (fibers::thread_index.x >= THREADS) fibers::fail("meets those that it does not belong to");
    fibers::meet(fibers::block().some, THREADS, 10);
}
inline void __syncwarp() { fibers::meet_warp(2); }
inline void __threadfence() {}
inline unsigned atomicAdd(unsigned* at, unsigned more) { return (*at += more) - more; }
inline float __ldcg(const float* p) { return *p; }
inline float __uint_as_float(uint32_t bits) { float f; std::memcpy(&f, &bits, 4); return f; }
inline uint32_t __float_as_uint(float f) { uint32_t bits; std::memcpy(&bits, &f, 4); return bits; }

inline uint32_t shared_address(const void* p) { return (uint32_t)((const uint8_t*)p - fibers::memory); }
inline void copy16(uint32_t to, const void* from, int bytes) {
    fibers::check(to, 16, 16);
    if ((uintptr_t)from % 16 || bytes < 0 || bytes > 16) fibers::fail("copies from an odd address, or odd bytes");
    const fibers::Copy copy{to, from, bytes};
    if (fibers::early) return fibers::land(copy);
    std::memset(fibers::memory + to, 255, 16);
    fibers::all[fibers::current].open.push_back(copy);
}
inline void commit() {
    auto& fiber = fibers::all[fibers::current];
    fiber.groups.push_back(std::move(fiber.open));
    fiber.open.clear();
}
template <int LEFT> void wait() {
    auto& groups = fibers::all[fibers::current].groups;
    for (; groups.size() > LEFT; groups.pop_front())
        for (const auto& copy : groups.front()) fibers::land(copy);
}
inline uint4 stream16(const uint4* p) { return *p; }

inline uint32_t of_lane(uint32_t value, int lane) {
    fibers::warp()[fibers::current % 32].value = value;
    fibers::meet_warp(8);
    const uint32_t found = fibers::warp()[lane].value;
    fibers::meet_warp(9);
    return found;
}

inline float to_float(uint16_t bits) {
#if FP16
    _Float16 half;
    std::memcpy(&half, &bits, 2);
    return (float)half;
#else
    return __uint_as_float((uint32_t)bits << 16);
#endif
}
inline uint16_t rounded(float f) {
#if FP16
    const _Float16 half = (_Float16)f;
    uint16_t bits;
    std::memcpy(&bits, &half, 2);
    return bits;
#else
    const uint32_t bits = __float_as_uint(f);
    return std::isnan(f) ? 0x7fff : (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
#endif
}
inline uint32_t to_pair(float low, float high) { return (uint32_t)rounded(high) << 16 | rounded(low); }

// Lane 4 g + t gets rows 2 t and 2 t + 1 of column g of every matrix.
inline void load_transposed(uint32_t (&b)[4], uint32_t row) {
    const int lane = fibers::current % 32;
    fibers::check(row, 16, 16);
    fibers::warp()[lane].row = row;
    fibers::meet_warp(3);
    for (int matrix = 0; matrix < 4; ++matrix) {
        uint16_t pair[2];
        for (int i = 0; i < 2; ++i) {
            const uint32_t from = fibers::warp()[8 * matrix + 2 * (lane % 4) + i].row;
            std::memcpy(&pair[i], fibers::memory + from + 2 * (lane / 4), 2);
        }
        std::memcpy(&b[matrix], pair, 4);
    }
    fibers::meet_warp(4);
}

// Sum i of lane 4 g + t: row g + 8 (i / 2), token 2 t + i % 2. Groups 0..3 of a row are in registers a0 or a1 (row + 8)
// of its four lanes, groups 4..7 in a2 or a3; their metadata in two of its lanes, 4 groups in half a word.
template <int SELECTOR>
void multiply(float (&d)[4], const uint4& a, const uint32_t (&b)[4], uint32_t metadata) {
    const int lane = fibers::current % 32, g = lane / 4;
    fibers::Lane* warp = fibers::warp();
    warp[lane] = {{a.x, a.y, a.z, a.w}, {b[0], b[1], b[2], b[3]}, metadata, 0, 0};
    fibers::meet_warp(5 + SELECTOR);
    for (int i = 0; i < 4; ++i) {
        const int high = i / 2, token = 2 * (lane % 4) + i % 2;
        for (int group = 0; group < 8; ++group) {
            const uint32_t values = warp[4 * g + group % 4].a[high + 2 * (group / 4)];
            const uint32_t marks = warp[4 * g + 2 * SELECTOR + group / 4].metadata;
            const uint32_t mark = marks >> (16 * high + 4 * (group % 4)) & 15;
            if ((mark & 3) >= mark >> 2) fibers::fail("metadata is not ordered");
            for (int j = 0; j < 2; ++j) {
                const int k = 4 * group + (int)(j ? mark >> 2 : mark & 3);
                const uint32_t x = warp[4 * token + k % 8 / 2].b[k / 8];
                d[i] += to_float((uint16_t)(values >> (16 * j))) * to_float((uint16_t)(x >> (16 * (k % 2))));
            }
        }
    }
    fibers::meet_warp(7);
}
