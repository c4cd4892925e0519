// backends/tensorrt/nm_linear.cu as a function for Python's ctypes; `launch` is the grid that the plugin asks for.
#include "cuda_on_cpu.h"
#include "nm_linear.cu"

extern "C" void run(unsigned grid_x, unsigned grid_y, unsigned threads, const ELEMENT* x, const VALUE* values,
                    const TABLE* positions, const TABLE* columns, const ELEMENT* bias, int tokens, int rows, int cols,
                    int groups, int v, int n, int m, int bits, ELEMENT* y) {
    launch(grid_x, grid_y, threads, [&] {
        nm_linear(x, values, positions, columns, bias, tokens, rows, cols, groups, v, n, m, bits, y);
    });
}
