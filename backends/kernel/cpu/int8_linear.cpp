// y = activation(int8 x W^T * scales + bias) from an int8 stream: quantise the tokens, cut the work, run the kernels.
//
// Loops, outermost first:
//   threads      ranges of tokens when there are plenty, otherwise ranges of row vectors
//   superblock   the tokens whose panels fit kPanelBytes
//   pair range   so that the weights of a row vector and the panel of a block stay in the first-level cache
//   row vector   expanded once, then used for every block; the panels are filled anew where a strip begins
//   block        of tokens
#include <algorithm>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "int8.h"
#include "kernels.h"

namespace int8 {

namespace {

constexpr int64_t kMaxPairs = 192;            // of a range: 24 KiB of weights, and half as much of a panel
constexpr int64_t kPanelBytes = 256 * 1024;   // of a superblock: a part of the second-level cache
constexpr int kMaxBlock = 16;
constexpr double kBytesPerNanosecond = 15;    // of weights from the last-level cache to one core
constexpr double kSerialNanoseconds = 30e3;   // below this, waking a second thread costs more than it saves

struct Scratch {
  alignas(64) uint8_t panel[kPanelBytes];
  alignas(64) uint8_t weights[kMaxPairs * kExpanded];
};
thread_local Scratch scratch;

struct Job {
  const Kernels* kernels;
  const ::Kernels* fp32;  // for the activation functions
  Geometry geometry;
  const uint8_t* stream;
  const float* x;
  const float* bias;
  float* y;
  Activation activation;
  int8_t* quantised;  // [token][row_bytes(cols)]
  float* token_scales;
};

struct Range {
  int64_t begin, end;
};

Range share(int64_t total, int64_t id, int64_t count) { return {total * id / count, total * (id + 1) / count}; }

void quantise(const Job& job, Range tokens) {
  const int64_t cols = job.geometry.shape.cols;
  for (int64_t token = tokens.begin; token < tokens.end; ++token)
    job.kernels->quantise({job.x + token * cols, cols, job.quantised + token * row_bytes(cols),
                           job.token_scales + token});
}

struct Block {
  int which, size;
};

Block next_block(const Kernels& kernels, int64_t tokens) {
  int which = 0;
  while (kernels.sizes[which] < tokens && kernels.sizes[which + 1]) ++which;
  return {which, kernels.sizes[which]};
}

void fill_panels(const Job& job, Range tokens, Range pairs, int64_t strip) {
  const Geometry& g = job.geometry;
  const int64_t stride = row_bytes(g.shape.cols);
  uint8_t* panel = scratch.panel;
  for (int64_t token = tokens.begin; token < tokens.end;) {
    const int64_t left = tokens.end - token;
    const int size = next_block(*job.kernels, left).size;
    job.kernels->fill({job.quantised + token * stride, stride, job.stream + g.columns_at + strip * g.groups * 4, &g,
                       pairs.begin, pairs.end - pairs.begin, int(std::min(left, int64_t(size))), size, panel});
    panel += (pairs.end - pairs.begin) * size * 8;
    token += size;
  }
}

void run_vector(const Job& job, Range tokens, Range pairs, int64_t vector) {
  const Geometry& g = job.geometry;
  const int64_t first = vector * g.pairs + pairs.begin, row = g.first_row(vector), rows = g.shape.rows;
  const int8_t* values = reinterpret_cast<const int8_t*>(job.stream + g.values_at) + first * kLanes * 4;
  job.kernels->expand({job.stream + g.codes_at + first * kLanes, values, pairs.end - pairs.begin, scratch.weights});
  TileCall call;
  call.panel = scratch.panel;
  call.weights = scratch.weights;
  call.values = values;
  call.pairs = pairs.end - pairs.begin;
  call.first = pairs.begin == 0;
  call.sums = reinterpret_cast<const int32_t*>(job.stream + g.sums_at) + vector * kLanes;
  call.y_stride = rows;
  call.rows = g.real_rows(vector);
  for (int64_t token = tokens.begin; token < tokens.end;) {
    const Block block = next_block(*job.kernels, tokens.end - token);
    call.tokens = std::min(tokens.end - token, int64_t(block.size));
    call.y = reinterpret_cast<int32_t*>(job.y) + token * rows + row;
    job.kernels->tile[block.which](call);
    call.panel += call.pairs * block.size * 8;
    token += block.size;
  }
}

// Sums become outputs while they are in the cache; `vectors` lie in one strip, so their rows follow each other.
void finish(const Job& job, Range tokens, Range vectors) {
  const Geometry& g = job.geometry;
  const int64_t row = g.first_row(vectors.begin);
  const int64_t rows = g.first_row(vectors.end - 1) + g.real_rows(vectors.end - 1) - row;
  const float* scales = reinterpret_cast<const float*>(job.stream + g.scales_at) + vectors.begin * kLanes;
  for (int64_t token = tokens.begin; token < tokens.end; ++token) {
    float* y = job.y + token * g.shape.rows + row;
    job.kernels->finish({y, rows, job.token_scales[token], scales, job.bias ? job.bias + row : nullptr});
    if (job.activation != kNone) job.fp32->activate(job.activation, y, rows);
  }
}

void run(const Job& job, Range tokens, Range vectors) {
  const Geometry& g = job.geometry;
  const int64_t ranges = (g.pairs + kMaxPairs - 1) / kMaxPairs;
  const int64_t longest = (g.pairs + ranges - 1) / ranges;
  const int64_t fit = kPanelBytes / (longest * 8) / kMaxBlock * kMaxBlock;
  for (int64_t token = tokens.begin; token < tokens.end; token += fit) {
    const Range part = {token, std::min(token + fit, tokens.end)};
    for (int64_t r = 0; r < ranges; ++r) {
      const Range pairs = share(g.pairs, r, ranges);
      for (int64_t vector = vectors.begin; vector < vectors.end;) {
        const int64_t strip = vector / g.strip_vectors;
        const Range strip_vectors = {vector, std::min((strip + 1) * g.strip_vectors, vectors.end)};
        fill_panels(job, part, pairs, strip);
        for (; vector < strip_vectors.end; ++vector) run_vector(job, part, pairs, vector);
        if (pairs.end == g.pairs) finish(job, part, strip_vectors);
      }
    }
  }
}

int useful_threads(const Job& job, int64_t tokens, int threads) {
  const Geometry& g = job.geometry;
  const double weights = double(g.vectors) * kLanes * double(g.pairs);
  const double compute = weights * 2 * double(tokens) / job.kernels->rate;
  return std::max(compute, weights * 5 / kBytesPerNanosecond) < kSerialNanoseconds ? 1 : threads;
}

// The level whose kernels run at `level`: AVX-512 without VNNI runs those of AVX2.
int level_of(int level) {
#if defined(__x86_64__)
  if (level == 2 && !(__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")))
    level = 1;
  if (level == 1 && !(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))) return -1;
  return level;
#else
  return level == 0 ? 0 : -1;
#endif
}

bool choose_kernels(int level, Job* job) {
  const int found = level_of(level);
  job->kernels = found == 2 ? vnni_kernels() : found == 1 ? avx2_kernels() : found == 0 ? portable_kernels() : nullptr;
  job->fp32 = found == 2 ? ::avx512_kernels() : found == 1 ? ::avx2_kernels() : ::portable_kernels();
  return job->kernels != nullptr;
}

}  // namespace

}  // namespace int8

using namespace int8;

extern "C" {

// Bytes of scratch memory that a call needs: the quantised activations and their scales.
int64_t sparsec_int8_workspace(int64_t tokens, int64_t cols) { return tokens * (row_bytes(cols) + 4); }

// The level whose kernels run where `level` is asked for, or -1: 0 portable, 1 AVX2, 2 AVX-512 VNNI.
int sparsec_int8_level(int level) { return level_of(level); }

// x [tokens][cols], bias [rows] or null, y [tokens][rows], workspace of at least sparsec_int8_workspace bytes.
// activation: see kernels.h. 0: done; 1: not a stream of this version for a weight rows x cols; 2: the processor lacks
// the level; 3: no such activation.
int sparsec_int8_linear(const uint8_t* stream, int64_t nbytes, const float* x, const float* bias, float* y,
                        int64_t tokens, int64_t rows, int64_t cols, int activation, void* workspace, int threads,
                        int level) {
  if (activation < kNone || activation > kSilu) return 3;
  Job job;
  if (!read_header(stream, nbytes, &job.geometry)) return 1;
  if (job.geometry.shape.rows != rows || job.geometry.shape.cols != cols) return 1;
  if (!choose_kernels(level, &job)) return 2;
  job.stream = stream;
  job.x = x;
  job.bias = bias;
  job.y = y;
  job.activation = Activation(activation);
  job.token_scales = static_cast<float*>(workspace);
  job.quantised = reinterpret_cast<int8_t*>(job.token_scales + tokens);
  const int64_t vectors = job.geometry.vectors;
  threads = useful_threads(job, tokens, threads);
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    {
      const int64_t id = omp_get_thread_num(), team = omp_get_num_threads();
      quantise(job, share(tokens, id, team));
#pragma omp barrier
      // Tokens cut no panel work in two; row vectors make every thread fill panels, so only for few tokens.
      if (tokens >= team * 32)
        run(job, share(tokens, id, team), {0, vectors});
      else
        run(job, {0, tokens}, share(vectors, id, team));
    }
    return 0;
  }
#endif
  quantise(job, {0, tokens});
  run(job, {0, tokens}, {0, vectors});
  return 0;
}

}  // extern "C"
