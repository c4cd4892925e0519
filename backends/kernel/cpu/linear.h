// One sparse linear layer on the threads of any pool.
#pragma once
#include <cstddef>
#include <cstdint>

// How a caller runs work on its threads: `run` calls share(job, id) once for every id in [0, count), in any order, and
// waits for all. A share never waits for another one.
struct Team {
  int threads;
  void (*run)(void* pool, int count, void (*share)(void* job, size_t id), void* job);
  void* pool;
};

// y = activation(x W^T + bias): x [tokens][cols], bias [rows] or null, y [tokens][rows].
// activation: see kernels.h. kernel: 0 chooses, 1 rows (wide streams run tokens all the same), 2 tokens.
// 0: done; 1: not a stream of this version for a weight rows x cols; 2: the processor lacks the level; 3: an unknown
// activation or kernel; 4: out of memory.
int linear(const uint8_t* stream, int64_t nbytes, const float* x, const float* bias, float* y, int64_t tokens,
           int64_t rows, int64_t cols, int activation, int kernel, const Team& team, int level);
