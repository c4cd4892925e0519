// The inner part of SparseGPT's sweep; called by native.py. sweep.py says what is computed and is the reference.
#include <algorithm>
#include <cstdint>
#include <cstring>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "unroll.h"

namespace {

constexpr int kPairs = 6;        // of 4 columns
constexpr int64_t kTurned = 32;  // rows at a time: two cache lines of a column
constexpr int64_t kAhead = 12;   // columns: they lie anywhere, so no prefetcher finds them

}  // namespace

// Whole groups of one block of columns; a mirror of `Block` in native.py. All matrices lie row by row.
struct Block {
  int64_t rows, width;   // of the weight; columns, a multiple of m
  int64_t m, n;          // columns of a group, of which n are kept
  int64_t height;        // rows taken at a time, a multiple of 16
  int64_t taken;         // of which so many are rows of the weight: less where V is no multiple of 16
  int64_t sets, quads;   // quads: 0, or choices of 4 columns, which `taken` rows share
  const int32_t* set;    // (sets, n) columns of a group
  const int32_t* pairs;  // (quads, 6) numbers of sets
  float* lost;           // (width, rows) the weights, each of which becomes what it loses
  const float* fed;      // (width, rows) what errors of earlier blocks add to them
  const float* unit;     // (width, width) feedback of a column's error to later ones
  const float* undo;     // (groups, m, m)
  const float* hessian;  // (groups, m, m)
  const float* values;   // (groups, sets, n, m) what gives a set's kept values from y
  const float* inverse;  // (groups, sets, n, n); with quads only
  float* scratch;        // for each thread `scratch_floats`, at a multiple of 64 bytes
  int64_t scratch_floats, threads;
  int64_t level;         // at most: 0 portable, 1 AVX2, 2 AVX-512
};

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx512f,fma")
#define SPARSEC_VECTOR 64
namespace avx512 {
#include "sweep_block.h"
}
#undef SPARSEC_VECTOR
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define SPARSEC_VECTOR 32
namespace avx2 {
#include "sweep_block.h"
}
#undef SPARSEC_VECTOR
#pragma GCC pop_options
#endif
#define SPARSEC_VECTOR 16
namespace portable {
#include "sweep_block.h"
}
#undef SPARSEC_VECTOR

extern "C" void sparsec_sweep(const Block* block) {
  const Block& b = *block;
  auto run = portable::run;
#if defined(__x86_64__)
  if (b.level >= 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) run = avx2::run;
  if (b.level >= 2 && __builtin_cpu_supports("avx512f")) run = avx512::run;
#endif
  const int64_t parts = (b.rows + b.taken - 1) / b.taken;
#pragma omp parallel num_threads(b.threads)
  {
#ifdef _OPENMP
    float* scratch = b.scratch + omp_get_thread_num() * b.scratch_floats;
#else
    float* scratch = b.scratch;
#endif
#pragma omp for schedule(static)
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t first = part * b.taken, left = b.rows - first;
      run(b, first, left < b.taken ? left : b.taken, scratch);
    }
  }
}

// turned (cols, rows): row place[j] is column j of a weight whose rows begin at row[0], row[1], ...
extern "C" void sparsec_turn(
    const float* const* row, int64_t rows, int64_t cols, const int64_t* place, float* turned, int64_t threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t first = 0; first < rows; first += kTurned) {
    const int64_t count = std::min(kTurned, rows - first);
    for (int64_t j = 0; j < cols; ++j)
      for (int64_t i = 0; i < count; ++i) turned[place[j] * rows + first + i] = row[first + i][j];
  }
}

// kept (rows, cols) = the weight less what it lost; `lost` lies as `turned` above.
extern "C" void sparsec_keep(
    const float* const* row, int64_t rows, int64_t cols, const int64_t* place, const float* lost, float* kept,
    int64_t threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t first = 0; first < rows; first += kTurned) {
    const int64_t count = std::min(kTurned, rows - first);
    for (int64_t j = 0; j < cols; ++j) {
      const float* next = lost + place[std::min(j + kAhead, cols - 1)] * rows + first;
      __builtin_prefetch(next), __builtin_prefetch(next + kTurned / 2);
      for (int64_t i = 0; i < count; ++i)
        kept[(first + i) * cols + j] = row[first + i][j] - lost[place[j] * rows + first + i];
    }
  }
}
