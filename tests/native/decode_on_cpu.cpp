// backends/kernel/cuda/decode.cu as a program: a file of arguments in, a file of results out. See cuda_fibers.py.
#include "cuda_fibers.h"
#include "decode.cu"
#include "cuda_case.h"

int main(int, char** arguments) {
    Case one(arguments[1]);
    const uint4* values = one.table<uint4>();
    const uint4* metadata = one.table<uint4>();
    const uint16_t* index = one.table<uint16_t>();
    const int* rows = one.table<int>();
    const uint16_t* x = one.table<uint16_t>();
    const uint16_t* bias = one.table<uint16_t>();
    float* partial = one.table<float>();
    uint32_t* tickets = one.table<uint32_t>();
    uint16_t* y = one.table<uint16_t>();
    const long long* n = one.numbers;
    const size_t partial_bytes = partial ? one.bytes[6] : 0, y_bytes = one.bytes[8];
    std::vector<uint8_t> first;
    for (int twice = 0; twice < 2; ++twice) {  // the tickets are left as they were found
        if (twice) first.assign((uint8_t*)y, (uint8_t*)y + y_bytes);
        std::memset(y, 255, y_bytes);
        if (partial) std::memset(partial, 255, partial_bytes);
        fibers::run(n[0], n[1], THREADS, n[2], n[3] + 2 * twice, [&] {
            decode(values, metadata, index, rows, x, bias, partial, tickets, y, n[4], n[5], n[6], n[7], n[8], n[9],
                   n[10], n[11], n[12]);
        });
    }
    if (std::memcmp(y, first.data(), y_bytes)) fibers::fail("a second launch gives other results");
    one.write(arguments[2], y);
}
