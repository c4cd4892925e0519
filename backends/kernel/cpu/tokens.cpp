// The token kernel: lanes are tokens. For many tokens, when multiplying takes the time.
//
// Loops, outermost first:
//   block        up to 8 vectors of tokens
//   band         the row vectors whose sums stay in half of a second-level cache
//   chunk range  so that the panel of its columns stays in the first-level cache
//   row vector   its indices and values are unpacked once, then each row takes one broadcast a kept weight
// Gathered streams copy the columns of each strip from a transposed copy of the block's activations. Where rows moved, the
// sums of all places wait until the block is done: what turns them into y reads 16 rows from wherever they lie.
#include <algorithm>

#include "job.h"
#include "scratch.h"

namespace {

thread_local Scratch scratch;

// What a block of tokens works in; sizes follow from the geometry and the block.
struct Plan {
  int vectors, block;        // vectors of tokens, and the tokens they hold
  int64_t ranges, band;      // chunk ranges; row vectors of a band
  float *panel, *weights, *last, *sums, *transposed;
  uint16_t* offsets;
};

int64_t align64(int64_t nbytes) { return (nbytes + 63) / 64 * 64; }

Plan make_plan(const Job& job, int64_t tokens, int64_t vectors) {
  const Geometry& g = job.geometry;
  const TokenKernels& kernels = job.kernels->tokens;
  const int64_t needed = (tokens + kernels.width - 1) / kernels.width;
  const int64_t chunk_bytes = g.chunk_columns * kernels.width * int64_t(sizeof(float));  // of a panel, a vector of tokens
  const int64_t most = std::min(int64_t(kMaxVectors), std::max(int64_t(1), caches().first_bytes / chunk_bytes));
  const int64_t blocks = (needed + most - 1) / most;  // of about equal size: a small last one would be slow
  Plan plan;
  plan.vectors = int((needed + blocks - 1) / blocks);
  plan.block = plan.vectors * kernels.width;
  const int64_t unpacked = g.steps * kLanes * int64_t(sizeof(float) + sizeof(uint16_t));  // of a chunk
  // What is gathered passes through the same cache: with panels of half of it strips are about 5 % faster.
  const int64_t room = g.gathered ? caches().first_bytes / 2 : caches().first_bytes;
  const int64_t fit = std::max(int64_t(1), room / (chunk_bytes * plan.vectors + unpacked));
  plan.ranges = (g.chunks + fit - 1) / fit;
  const int64_t row_bytes = plan.block * int64_t(sizeof(float)), steps = std::min(fit, g.chunks) * g.steps;
  plan.band = std::min(vectors, std::max(int64_t(1), caches().second_bytes / (row_bytes * kLanes)));
  const int64_t panel = align64(std::min(fit, g.chunks) * g.chunk_columns * row_bytes);
  const int64_t weights = steps * kLanes * int64_t(sizeof(float)), offsets = align64(steps * kLanes * 2);
  const int64_t last = kLanes * row_bytes;
  const int64_t sums = g.pattern.moved ? vectors * last : plan.ranges > 1 ? plan.band * last : 0;
  char* at = scratch.reserve(panel + weights + offsets + last + sums + (g.gathered ? g.pattern.cols * row_bytes : 0));
  const auto take = [&at](int64_t nbytes) { return reinterpret_cast<float*>((at += nbytes) - nbytes); };
  plan.panel = take(panel);
  plan.weights = take(weights);
  plan.offsets = reinterpret_cast<uint16_t*>(take(offsets));
  plan.last = take(last);
  plan.sums = take(sums);
  plan.transposed = reinterpret_cast<float*>(at);
  return plan;
}

// The columns that a strip shares, from the transposed activations; indices name no other place of the panel.
void gather(const Job& job, const Plan& plan, Range chunks, int64_t strip) {
  const Geometry& g = job.geometry;
  job.kernels->tokens.copy({plan.transposed, job.columns_at(strip, chunks.begin), (chunks.end - chunks.begin) * kLanes,
                            plan.block, plan.panel});
}

constexpr int32_t kInOrder[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// Up to 16 rows of y from the sums at these places.
void store(const Job& job, const Plan& plan, Range tokens, Range rows, const float* sums, const int32_t* places) {
  const int64_t stride = job.geometry.pattern.rows;
  job.kernels->tokens.transpose_out({sums, places, plan.block, int(tokens.end - tokens.begin), int(rows.end - rows.begin),
                                     job.y + tokens.begin * stride + rows.begin, stride});
}

void run_vector(const Job& job, const Plan& plan, Range chunks, Range tokens, int64_t vector, float* sums) {
  const Geometry& g = job.geometry;
  const TokenKernels& kernels = job.kernels->tokens;
  const bool is_last = chunks.end == g.chunks;
  const int64_t count = chunks.end - chunks.begin, row = vector * kLanes;
  const int rows = int(std::min(g.pattern.rows - row, int64_t(kLanes))), last_steps = is_last ? g.last_steps : g.steps;
  kernels.unpack({job.index_at(vector, chunks.begin), job.values_at(vector, chunks.begin),
                  g.tile_vectors(vector / kTileVectors), count, g.steps, last_steps, g.chunk_columns,
                  g.slot ? g.column : nullptr, plan.block * int(sizeof(float)),
                  g.pattern.values == kBfloat16, plan.offsets, plan.weights});
  // Past the last row vector it points nowhere that matters: prefetching never faults.
  const float* ahead = job.values_at(std::min(vector + 1, g.vectors - 1), chunks.begin);
  const int64_t ahead_stride = g.tile_vectors(std::min(vector + 1, g.vectors - 1) / kTileVectors) * kLanes * 4;
  float bias[kLanes] = {};
  for (int r = 0; job.bias && r < rows; ++r) bias[r] = job.bias[job.row_of(row + r)];
  float* to = is_last && !g.pattern.moved ? plan.last : sums;
  kernels.sum[plan.vectors - 1]({plan.panel, plan.offsets, plan.weights, (count - 1) * g.steps + last_steps,
                                 chunks.begin ? sums : nullptr, bias, to, rows, ahead,
                                 ahead_stride, count * g.chunk_words});
  if (!is_last) return;
  if (job.activation != kNone) job.kernels->activate(job.activation, to, int64_t(rows) * plan.block);
  if (!g.pattern.moved) store(job, plan, tokens, {row, row + rows}, plan.last, kInOrder);
}

void run_block(const Job& job, const Plan& plan, Range tokens, Range vectors) {
  const Geometry& g = job.geometry;
  const float* x = job.x + tokens.begin * g.pattern.cols;
  const int count = int(tokens.end - tokens.begin);
  const auto transpose_in = [&](int64_t first, int64_t end, float* to) {
    job.kernels->tokens.transpose_in({x + first, g.pattern.cols, end - first, count, plan.block, to});
  };
  if (g.gathered) transpose_in(0, g.pattern.cols, plan.transposed);
  const int64_t strip = g.gathered ? g.pattern.v / kLanes : 0;  // row vectors of one
  for (int64_t band = vectors.begin; band < vectors.end; band += plan.band) {
    const int64_t end = std::min(band + plan.band, vectors.end);
    for (int64_t r = 0; r < plan.ranges; ++r) {
      const Range chunks = {g.chunks * r / plan.ranges, g.chunks * (r + 1) / plan.ranges};
      if (!g.gathered)
        transpose_in(chunks.begin * g.chunk_columns, std::min(chunks.end * g.chunk_columns, g.pattern.cols), plan.panel);
      for (int64_t vector = band; vector < end; ++vector) {
        if (g.gathered && (vector == band || vector % strip == 0)) gather(job, plan, chunks, vector / strip);
        const int64_t at = vector - (g.pattern.moved ? vectors.begin : band);
        run_vector(job, plan, chunks, tokens, vector, plan.sums + at * kLanes * plan.block);
      }
    }
  }
  for (int64_t row = 0; g.pattern.moved && row < g.pattern.rows; row += kLanes)
    store(job, plan, tokens, {row, std::min(row + kLanes, g.pattern.rows)}, plan.sums,
          job.table_at(g.places_at) + row);
}

}  // namespace

void run_tokens(const Job& job, Range tokens, Range vectors) {
  if (tokens.begin == tokens.end || vectors.begin == vectors.end) return;
  const Plan plan = make_plan(job, tokens.end - tokens.begin, vectors.end - vectors.begin);
  for (int64_t first = tokens.begin; first < tokens.end; first += plan.block)
    run_block(job, plan, {first, std::min(first + plan.block, tokens.end)}, vectors);
}
