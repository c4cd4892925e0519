// Copies by the tensor memory accelerator, barriers in shared memory, and clusters of thread blocks, as functions.
// CUDA C++ for NVRTC, sm_90 and later; tests/native/cuda_clusters.h has the same functions for CPUs.
//
// A barrier is 8 bytes of shared memory. Its phase ends when all arrivals and all expected bytes are there; the next
// begins at once. Phases have parity 0, 1, 0, ... Copies go to the same place of every thread block in `blocks` (bit i:
// rank i of the cluster) and report their bytes to the barrier at the same place there.
// What a copy wrote may be read after `wait_phase`; what others have read may be copied over after they arrived. Between
// thread blocks nothing else is ordered: a barrier that did would wait for all of a thread's memory, every time.
#pragma once
#include "device.cuh"

#ifndef ON_CPU
struct alignas(64) TensorMap {  // of a matrix and the box of it that a copy takes, as the driver encodes them
    unsigned long long words[16];
};

__device__ __forceinline__ void init_barrier(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void publish_barriers() {  // what this thread has begun is there for the cluster and copies
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void sync_cluster() {  // all threads of all its thread blocks
    asm volatile("barrier.cluster.arrive.release;\n"
                 "barrier.cluster.wait.acquire;" ::: "memory");
}

__device__ __forceinline__ void arrive_and_expect(uint32_t barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void arrive_at(uint32_t barrier, int rank) {  // at the barrier of one of the cluster
    asm volatile("{\n"
                 ".reg .b32 there;\n"
                 "mapa.shared::cluster.u32 there, %0, %1;\n"
                 "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
                 "}" ::"r"(barrier), "r"(rank) : "memory");
}
__device__ __forceinline__ void wait_phase(uint32_t barrier, uint32_t parity) {  // until the phase of this parity is over
    uint32_t over = 0;
    while (!over)
        asm volatile("{\n"
                     ".reg .pred over;\n"
                     "mbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2;\n"
                     "selp.b32 %0, 1, 0, over;\n"
                     "}" : "=r"(over) : "r"(barrier), "r"(parity) : "memory");
}

// Of the registers of a thread block, whose warps have the same number at first, in groups of 4 warps. All of a group call.
template <int LEFT> __device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(LEFT));
}
template <int OWN> __device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(OWN));
}

// A box of 64 tokens and the lines from `col`: lines of 128 bytes, in which piece i of line l lies at i ^ l % 8; zeros
// beyond the matrix.
__device__ __forceinline__ void copy_box(uint32_t to, const TensorMap& x, int token, int col, uint32_t barrier,
                                         uint16_t blocks) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
                 "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to), "l"(&x), "r"(token), "r"(col), "r"(barrier), "h"(blocks)
                 : "memory");
}
__device__ __forceinline__ void copy_run(uint32_t to, const void* from, int bytes, uint32_t barrier, uint16_t blocks) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
                 "[%0], [%1], %2, [%3], %4;" ::"r"(to), "l"(from), "r"(bytes), "r"(barrier), "h"(blocks) : "memory");
}
#endif  // ON_CPU
