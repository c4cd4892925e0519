// backends/kernel/cuda/tma.cuh for CPUs, beside cuda_fibers.h. What a GPU would hide or hang on, and this finds:
//   a copy lands at once, at any time later, or only when all threads wait, in each thread block at a time of its own;
//   what it will write is NaN and 255 from when it is asked for
//   barriers that are used before they are begun, published or aligned, or are written over; an arrival too many
//   bytes that were expected and do not come, or come and were not expected; phases that never end
//   what is done to a thread block that has ended; what is left in flight, or in the middle of a phase, at the end
#pragma once
#include <map>

#include "cuda_fibers.h"

struct TensorMap {  // (cols, tokens), `stride` elements from a column's line to the next, and the lines of a box
    const uint16_t* from;
    int64_t cols, tokens, stride;
    int lines;
};

namespace fibers {
struct Phases {
    int arrivals, left, count;  // of a phase, of this phase; phases that are over
    int64_t bytes;              // expected, less those that came
    int by;                     // the thread that began it, while others may not see it; then -1
};
struct Flight { int rank; uint32_t barrier; int bytes; std::function<void(uint8_t*)> land; };  // its shared memory

static std::vector<std::map<uint32_t, Phases>> phases;  // by rank, by address
static std::vector<Flight> flights;
static Barrier cluster;
static int seed_of_flights;
constexpr uint64_t BEGUN = 0x5eed5eed5eed5eed;  // in memory where a barrier is

inline Phases& phases_at(int rank, uint32_t barrier, bool mine) {
    if (rank < 0 || rank >= (int)blocks.size()) fail("no such thread block in the cluster");
    if (!blocks[rank].running) fail("reaches a thread block that has ended");
    const auto found = phases[rank].find(barrier);
    if (found == phases[rank].end()) fail("no barrier was begun here");
    if (std::memcmp(blocks[rank].memory + barrier, &BEGUN, 8)) fail("a barrier was written over");
    if (found->second.by >= 0 && !(mine && found->second.by == current)) fail("a barrier was not published");
    return found->second;
}
inline void end_phase(Phases& one) {
    if (one.left || one.bytes) return;
    one.left = one.arrivals;
    ++one.count;
}
inline void arrive(Phases& one) {
    if (!one.left) fail("arrives at a barrier that waits for no one");
    --one.left;
    ++progress;
    end_phase(one);
}
inline void land(size_t i) {
    const Flight flight = std::move(flights[i]);
    flights.erase(flights.begin() + i);
    Phases& one = phases_at(flight.rank, flight.barrier, false);
    flight.land(blocks[flight.rank].memory);
    one.bytes -= flight.bytes;
    ++progress;
    end_phase(one);
}
inline void fly(uint16_t to_blocks, uint32_t to, int bytes, uint32_t barrier, std::function<void(uint8_t*)> landing) {
    if (!to_blocks || to_blocks >> blocks.size()) fail("copies to no thread block, or to none of the cluster");
    for (int rank = 0; rank < (int)blocks.size(); ++rank) {
        if (!(to_blocks >> rank & 1)) continue;
        phases_at(rank, barrier, false);
        std::memset(blocks[rank].memory + to, 255, bytes);
        flights.push_back({rank, barrier, bytes, landing});
        if (early) land(flights.size() - 1);
    }
}
inline bool some_land() {  // some when nobody can do without, or, with every other seed, a few at any time
    static int before = -1;
    const bool stuck = progress == before;
    const size_t asked = flights.size();
    for (size_t i = asked; i-- > 0 && (stuck || seed_of_flights % 4 == 2);)
        if (random() % (stuck ? 2 : 8) == 0) land(i);
    if (stuck && asked && flights.size() == asked) land(random() % asked);
    before = progress;
    return flights.size() < asked;
}
inline void run_clusters(int cluster_x, int cluster_y, int grid_x, int grid_y, int block_threads, uint32_t shared_bytes,
                         int seed, std::function<void()> body) {
    seed_of_flights = seed;
    between_rounds = some_land;
    at_begin = [] {
        phases.assign(blocks.size(), {});
        cluster = Barrier{};
    };
    at_end = [] {
        if (!flights.empty()) fail("a copy is still in flight at the end");
        for (const auto& of_block : phases)
            for (const auto& [at, one] : of_block)
                if (one.left != one.arrivals || one.bytes) fail("a barrier is left in the middle of a phase");
    };
    run(grid_x, grid_y, block_threads, shared_bytes, seed, std::move(body), cluster_x, cluster_y);
}
}  // namespace fibers

inline void init_barrier(uint32_t barrier, int arrivals) {
    fibers::check(barrier, 8, 8);
    std::memcpy(fibers::memory + barrier, &fibers::BEGUN, 8);
    fibers::phases[fibers::current / fibers::threads][barrier] = {arrivals, arrivals, 0, 0, fibers::current};
}
inline void publish_barriers() {
    for (auto& [at, one] : fibers::phases[fibers::current / fibers::threads])
        if (one.by == fibers::current) one.by = -1;
}
inline void sync_cluster() { fibers::meet(fibers::cluster, (int)fibers::all.size(), 11); }

inline void arrive_and_expect(uint32_t barrier, int bytes) {
    fibers::Phases& one = fibers::phases_at(fibers::current / fibers::threads, barrier, true);
    if (bytes < 0 || bytes >= 1 << 20) fibers::fail("expects more bytes than a barrier counts");
    one.bytes += bytes;
    fibers::arrive(one);
}
inline void arrive_at(uint32_t barrier, int rank) { fibers::arrive(fibers::phases_at(rank, barrier, false)); }
inline void wait_phase(uint32_t barrier, uint32_t parity) {
    const int rank = fibers::current / fibers::threads;
    if (parity > 1) fibers::fail("a parity is 0 or 1");
    while (fibers::phases_at(rank, barrier, true).count % 2 == (int)parity)
        swapcontext(&fibers::all[fibers::current].context, &fibers::scheduler);
    ++fibers::progress;
}

template <int> void give_registers() {}
template <int> void take_registers() {}
inline void copy_box(uint32_t to, const TensorMap& x, int token, int col, uint32_t barrier, uint16_t blocks) {
    fibers::check(to, 128 * x.lines, 1024);
    if ((uintptr_t)x.from % 16 || x.stride % 8 || x.lines > 256) fibers::fail("no tensor map takes such a matrix");
    fibers::fly(blocks, to, 128 * x.lines, barrier, [=](uint8_t* memory) {
        for (int line = 0; line < x.lines; ++line)
            for (int i = 0; i < 64; ++i) {
                const bool inside = col + line < x.cols && token + i < x.tokens;
                const uint16_t number = inside ? x.from[(col + line) * x.stride + token + i] : 0;
                std::memcpy(memory + to + 128 * line + (i / 8 ^ line % 8) * 16 + i % 8 * 2, &number, 2);
            }
    });
}
inline void copy_run(uint32_t to, const void* from, int bytes, uint32_t barrier, uint16_t blocks) {
    fibers::check(to, bytes, 16);
    if ((uintptr_t)from % 16 || bytes <= 0 || bytes % 16) fibers::fail("copies from an odd address, or odd bytes");
    fibers::fly(blocks, to, bytes, barrier, [=](uint8_t* memory) { std::memcpy(memory + to, from, bytes); });
}
