// y = x W^T + bias from a stream: cut the work into blocks that fit the caches and run the kernels of one level.
//
// Loops, outermost first (all but wide streams):
//   threads      ranges of tokens when there are plenty, otherwise ranges of row vectors
//   superblock   the tokens whose panels fit half of a second-level cache
//   chunk range  so that the panel of one block stays in the first-level cache
//   tile, block  a tile's weights are read from memory once and then serve every block of the superblock
#include <unistd.h>

#include <algorithm>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "kernels.h"

namespace {

constexpr int64_t kMaxPanelBytes = 36 * 1024;
constexpr int kMaxBlocks = 12;  // of a superblock
constexpr double kBytesPerNanosecond = 15;  // of weights from the last-level cache to one core
constexpr double kSerialNanoseconds = 30e3;  // below this, waking a second thread costs more than it saves

alignas(64) thread_local float panels[kMaxBlocks][kMaxPanelBytes / sizeof(float)];

struct CachePlan {
  int64_t panel_bytes;  // of one block
  int blocks;           // of a superblock
};

// A panel takes three quarters of the first-level cache: the weights only stream through the rest. Measured with
// 48 KiB: 36 KiB is 3 to 7 % faster than 24 KiB. The panels of a superblock take half of the second-level cache: a
// 4096 x 4096 layer, whose weights come from memory once a superblock, gains 3 to 20 % from 12 blocks over 4.
CachePlan plan_caches() {
  int64_t first = 0, second = 0;
#ifdef _SC_LEVEL1_DCACHE_SIZE
  first = sysconf(_SC_LEVEL1_DCACHE_SIZE);
  second = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
  const int64_t panel = std::min(std::max(first, int64_t(32) * 1024) * 3 / 4, kMaxPanelBytes);
  const int64_t blocks = std::min(std::max(second, int64_t(256) * 1024) / 2 / panel, int64_t(kMaxBlocks));
  return {panel, int(blocks)};
}

const CachePlan& caches() {
  static const CachePlan plan = plan_caches();
  return plan;
}

struct Job {
  const Kernels* kernels;
  Geometry geometry;
  const uint8_t* stream;
  const float* x;
  const float* bias;
  Activation activation;
  float* y;
};

struct Range {
  int64_t begin, end;
};

struct Block {
  int64_t first;    // token
  int64_t tokens;   // real ones
  int size, which;  // padded size and its place in Kernels::sizes
};

Block next_block(const Kernels& kernels, int64_t first, int64_t end) {
  int which = 0;
  while (kernels.sizes[which] < end - first && kernels.sizes[which + 1]) ++which;
  const int size = kernels.sizes[which];
  return {first, std::min(end - first, int64_t(size)), size, which};
}

// The activation of `rows` rows (those past the last one left out) from `row` on, of `tokens` tokens.
void activate(const Job& job, int64_t row, int64_t rows, int64_t token, int64_t tokens) {
  if (job.activation == kNone) return;
  const int64_t stride = job.geometry.pattern.rows;
  rows = std::min(rows, stride - row);
  for (int64_t t = token; t < token + tokens; ++t) job.kernels->activate(job.activation, job.y + t * stride + row, rows);
}

// Row vectors [at, end) of one tile through one block.
void run_tile(const Job& job, const Block& block, const float* panel, Range chunks, int64_t tile, Range vectors) {
  const Geometry& g = job.geometry;
  const int64_t width = g.tile_vectors(tile), rows = g.pattern.rows;
  const uint8_t* index = job.stream + g.index_at +
      (tile * kTileVectors * g.total_pairs + chunks.begin * ((g.steps + 1) / 2) * width) * kLanes;
  const float* values = reinterpret_cast<const float*>(job.stream + g.values_at) +
      (tile * kTileVectors * g.total_steps + chunks.begin * g.steps * width) * kLanes;
  TileCall call;
  call.panel = panel;
  call.tile_vectors = width;
  call.chunks = chunks.end - chunks.begin;
  call.steps = g.steps;
  call.last_steps = chunks.end == g.chunks ? g.last_steps : g.steps;
  call.slot = g.slot;
  call.half = g.half;
  call.first = chunks.begin == 0;
  call.y_stride = rows;
  call.tokens = block.tokens;
  for (int64_t at = vectors.begin; at < vectors.end;) {
    int log2 = 2;
    while ((1 << log2) > vectors.end - at || !job.kernels->tile[block.which][log2]) --log2;
    const int64_t in_tile = at - tile * kTileVectors, row = at * kLanes;
    call.index = index + in_tile * kLanes;
    call.values = values + in_tile * kLanes;
    call.bias = job.bias ? job.bias + row : nullptr;
    call.y = job.y + block.first * rows + row;
    call.rows = rows - row;
    job.kernels->tile[block.which][log2](call);
    at += 1 << log2;
  }
  if (chunks.end == g.chunks) {
    const int64_t row = vectors.begin * kLanes;
    activate(job, row, (vectors.end - vectors.begin) * kLanes, block.first, block.tokens);
  }
}

// The same for gathered streams, from the columns of one strip: [group][4], offset in the group.
void fill_gathered(const Geometry& g, const uint8_t* columns, const FillCall& call) {
  for (int64_t chunk = 0; chunk < call.chunks; ++chunk) {
    int64_t from[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      const int64_t group = (call.first_chunk + chunk) * g.groups_per_chunk + i / 4;
      from[i] = group < g.groups ? group * g.pattern.m + columns[group * 4 + i % 4] : 0;
    }
    float* to = call.panel + chunk * call.block * kLanes;
    for (int t = 0; t < call.block; ++t)
      for (int i = 0; i < kLanes; ++i) to[t * kLanes + i] = t < call.tokens ? call.x[t * call.cols + from[i]] : 0.0f;
  }
}

void fill(const Job& job, const Block& block, Range chunks, int64_t strip, float* panel) {
  const Geometry& g = job.geometry;
  const FillCall call = {job.x + block.first * g.pattern.cols, g.pattern.cols, chunks.begin, chunks.end - chunks.begin,
                         int(g.pattern.m), g.slot, int(block.tokens), block.size, panel};
  if (g.gathered) return fill_gathered(g, job.stream + g.columns_at + strip * g.groups * 4, call);
  job.kernels->fill(call);
}

void run_superblock(const Job& job, const Block* blocks, int count, Range vectors) {
  const Geometry& g = job.geometry;
  const int64_t fit = caches().panel_bytes / (blocks[0].size * kLanes * int64_t(sizeof(float)));  // [0] is the largest
  const int64_t ranges = (g.chunks + fit - 1) / fit;
  // Row vectors that share a panel: all of them, or those of a strip.
  const int64_t shared = g.gathered ? g.pattern.v / kLanes : g.vectors;
  for (int64_t r = 0; r < ranges; ++r) {
    const Range chunks = {g.chunks * r / ranges, g.chunks * (r + 1) / ranges};
    for (int64_t at = vectors.begin; at < vectors.end;) {
      const int64_t strip = at / shared, strip_end = std::min((strip + 1) * shared, vectors.end);
      for (int b = 0; b < count; ++b) fill(job, blocks[b], chunks, strip, panels[b]);
      while (at < strip_end) {
        const int64_t tile = at / kTileVectors;
        const Range part = {at, std::min((tile + 1) * kTileVectors, strip_end)};
        for (int b = 0; b < count; ++b) run_tile(job, blocks[b], panels[b], chunks, tile, part);
        at = part.end;
      }
    }
  }
}

void run_panels(const Job& job, Range tokens, Range vectors) {
  while (tokens.begin < tokens.end) {
    Block blocks[kMaxBlocks];
    int count = 0;
    for (; count < caches().blocks && tokens.begin < tokens.end; ++count) {
      blocks[count] = next_block(*job.kernels, tokens.begin, tokens.end);
      tokens.begin += blocks[count].tokens;
    }
    run_superblock(job, blocks, count, vectors);
  }
}

void run_gather(const Job& job, Range tokens, Range vectors) {
  const Geometry& g = job.geometry;
  for (int64_t token = tokens.begin; token < tokens.end; token += kGatherTokens) {
    const int64_t left = tokens.end - token;
    for (int64_t at = vectors.begin; at < vectors.end; ++at) {
      const int64_t tile = at / kTileVectors, in_tile = at % kTileVectors, row = at * kLanes;
      job.kernels->gather({job.x + token * g.pattern.cols, g.pattern.cols,
                           job.stream + g.index_at + (tile * kTileVectors * g.total_pairs + in_tile) * kLanes,
                           reinterpret_cast<const float*>(job.stream + g.values_at) +
                               (tile * kTileVectors * g.total_steps + in_tile) * kLanes,
                           g.tile_vectors(tile), g.groups, g.pattern.n, g.pattern.m,
                           job.bias ? job.bias + row : nullptr, job.y + token * g.pattern.rows + row, g.pattern.rows,
                           g.pattern.rows - row, std::min(left, int64_t(kGatherTokens))});
      activate(job, row, kLanes, token, std::min(left, int64_t(kGatherTokens)));
    }
  }
}

void run(const Job& job, Range tokens, Range vectors) {
  if (job.geometry.slot) return run_panels(job, tokens, vectors);
  run_gather(job, tokens, vectors);
}

int useful_threads(const Job& job, int64_t tokens, int threads) {
  const Geometry& g = job.geometry;
  const double weights = double(g.vectors) * kLanes * double(g.total_steps);
  const double compute = weights * double(tokens) / (g.slot ? job.kernels->rate.tile : job.kernels->rate.gather);
  const double stream = weights * 4.5 / kBytesPerNanosecond;
  return std::max(compute, stream) < kSerialNanoseconds ? 1 : threads;
}

const Kernels* kernels_of(int level) {
#if defined(__x86_64__)
  if (level == 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    return avx512_kernels();
  if (level == 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2_kernels();
#endif
  return level == 0 ? portable_kernels() : nullptr;
}

}  // namespace

extern "C" {

// 1 when this processor can run the level: 0 portable, 1 AVX2 + FMA, 2 AVX-512.
int sparsec_supports(int level) { return kernels_of(level) != nullptr; }

// y = activation(x W^T + bias): x [tokens][cols], bias [rows] or null, y [tokens][rows].
// activation: see kernels.h. kernel: 0 chooses, 1 rows, 2 tokens.
// 0: done; 1: not a stream of this version for a weight rows x cols; 2: the processor lacks the level; 3: an unknown
// activation or kernel.
int sparsec_linear(const uint8_t* stream, int64_t nbytes, const float* x, const float* bias, float* y, int64_t tokens,
                   int64_t rows, int64_t cols, int activation, int kernel, int threads, int level) {
  if (activation < kNone || activation > kSilu || kernel < 0 || kernel > 2) return 3;
  Job job;
  if (!read_header(stream, nbytes, &job.geometry)) return 1;
  if (job.geometry.pattern.rows != rows || job.geometry.pattern.cols != cols) return 1;
  job.kernels = kernels_of(level);
  if (!job.kernels) return 2;
  job.stream = stream;
  job.x = x;
  job.bias = bias;
  job.activation = Activation(activation);
  job.y = y;
  const int64_t vectors = job.geometry.vectors;
  threads = useful_threads(job, tokens, threads);
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    {
      const int64_t id = omp_get_thread_num(), team = omp_get_num_threads();
      // Tokens cut no panel work in two; row vectors make every thread copy all activations, so only for few tokens.
      if (tokens >= team * 32)
        run(job, {tokens * id / team, tokens * (id + 1) / team}, {0, vectors});
      else
        run(job, {0, tokens}, {vectors * id / team, vectors * (id + 1) / team});
    }
    return 0;
  }
#endif
  run(job, {0, tokens}, {0, vectors});
  return 0;
}

}  // extern "C"
