// backends/kernel/cuda/window.cu as a program: a file of arguments in, a file of results out. See cuda_fibers.py.
#include "cuda_clusters.h"
#include "window.cu"
#include "cuda_case.h"

int main(int, char** arguments) {
    Case one(arguments[1]);
    const uint4* values = one.table<uint4>();
    const uint4* metadata = one.table<uint4>();
    const uint8_t* index = one.table<uint8_t>();
    const int* rows = one.table<int>();
    const uint16_t* x = one.table<uint16_t>();
    const uint16_t* bias = one.table<uint16_t>();
    uint16_t* y = one.table<uint16_t>();
    const long long* n = one.numbers;
    const TensorMap map{x, n[5], n[6], n[7], SHARE};
    fibers::run_clusters(CLUSTER_N, CLUSTER_M, n[0], n[1], THREADS, n[2], n[3], [&] {
        window(values, metadata, index, rows, map, bias, y, n[4], n[5], n[6], n[7], n[8], n[9], n[10]);
    });
    one.write(arguments[2], y);
}
