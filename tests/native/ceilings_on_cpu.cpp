// backends/kernel/cuda/ceilings.cu as a program: a file of arguments in, a file of results out. See cuda_fibers.py.
#include "cuda_fibers.h"
#include "ceilings.cu"
#include "cuda_case.h"

int main(int, char** arguments) {
    Case one(arguments[1]);
    const uint4* input = one.table<uint4>();
    const uint8_t* places = one.table<uint8_t>();
    float* output = one.table<float>();
    const long long* n = one.numbers;
    fibers::run(n[0], n[1], THREADS, n[2], n[3], [&] { ceilings(input, places, output, n[4], n[5], n[6]); });
    one.write(arguments[2], output);
}
