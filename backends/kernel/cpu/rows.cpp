// The row kernel: lanes are 16 rows of the weight. For few tokens, when reading the weights takes the time.
//
// Loops, outermost first:
//   superblock   the tokens whose panels fit half of a second-level cache
//   chunk range  so that the panel of one block stays in the first-level cache
//   tile, block  a tile's weights are read from memory once and then serve every block of the superblock
#include <algorithm>

#include "job.h"
#include "scratch.h"

namespace {

constexpr int kMaxBlocks = 12;  // of a superblock

alignas(64) thread_local float panels[kMaxBlocks][kMaxPanelBytes / sizeof(float)];

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

// Where sums are kept, by token and place: y itself or, where rows moved, memory of this thread.
struct Sums {
  float* first;
  int64_t stride, token, place;  // token, place: of the first
  float* at(int64_t t, int64_t p) const { return first + (t - token) * stride + p - place; }
};

thread_local Scratch scratch;

Sums sums_of(const Job& job, Range tokens, Range vectors) {
  const int64_t rows = job.geometry.pattern.rows, place = vectors.begin * kLanes;
  if (!job.geometry.pattern.moved) return {job.y + tokens.begin * rows + place, rows, tokens.begin, place};
  const int64_t stride = (vectors.end - vectors.begin) * kLanes;
  char* memory = scratch.reserve((tokens.end - tokens.begin) * stride * int64_t(sizeof(float)));
  return {reinterpret_cast<float*>(memory), stride, tokens.begin, place};
}

void activate(const Job& job, const Sums& sums, Range tokens, int64_t place, int64_t count) {
  if (job.activation == kNone) return;
  for (int64_t t = tokens.begin; t < tokens.end; ++t) job.kernels->activate(job.activation, sums.at(t, place), count);
}

// Where rows moved: the sums of these row vectors to y, a token at a time, which keeps both in the first-level cache.
void put_in_place(const Job& job, const Sums& sums, Range tokens, Range vectors) {
  const Geometry& g = job.geometry;
  const int64_t rows = g.pattern.rows, place = vectors.begin * kLanes;
  const int64_t count = std::min(vectors.end * kLanes, rows) - place, whole = rows / kLanes;
  const int32_t *row = job.table_at(g.rows_at) + place, *places = job.table_at(g.places_at);
  for (int64_t t = tokens.begin; t < tokens.end; ++t) {
    const float* from = sums.at(t, place);
    float* y = job.y + t * rows;
    if (count < rows) {  // some of the rows: each goes where it belongs
      for (int64_t i = 0; i < count; ++i) y[row[i]] = from[i];
      continue;
    }
    job.kernels->gather({from, rows, places, whole, 1, 1, y});  // all rows: y fetches them in its order
    for (int64_t i = whole * kLanes; i < rows; ++i) y[i] = from[places[i]];
  }
}

// Row vectors [at, end) of one tile through one block.
void run_tile(const Job& job, const Sums& sums, const Block& block, const float* panel, Range chunks, Range vectors) {
  const Geometry& g = job.geometry;
  const int64_t place = vectors.begin * kLanes, left = g.pattern.rows - place;
  const int64_t rows = std::min((vectors.end - vectors.begin) * kLanes, left);
  float moved_bias[kTileVectors * kLanes];
  const float* bias = job.bias ? job.bias + place : nullptr;
  if (bias && g.pattern.moved) {
    for (int64_t i = 0; i < rows; ++i) moved_bias[i] = job.bias[job.row_of(place + i)];
    bias = moved_bias;
  }
  TileCall call;
  call.panel = panel;
  call.tile_vectors = g.tile_vectors(vectors.begin / kTileVectors);
  call.chunks = chunks.end - chunks.begin;
  call.steps = g.steps;
  call.last_steps = chunks.end == g.chunks ? g.last_steps : g.steps;
  call.slot = g.slot;
  call.half = g.half;
  call.bf16 = g.pattern.values == kBfloat16;
  call.first = chunks.begin == 0;
  call.y_stride = sums.stride;
  call.tokens = block.tokens;
  for (int64_t at = vectors.begin; at < vectors.end;) {
    int log2 = 2;
    while ((1 << log2) > vectors.end - at || !job.kernels->tile[block.which][log2]) --log2;
    const int64_t done = at * kLanes - place;
    call.index = job.index_at(at, chunks.begin);
    call.values = job.values_at(at, chunks.begin);
    call.bias = bias ? bias + done : nullptr;
    call.y = sums.at(block.first, place + done);
    call.rows = left - done;
    job.kernels->tile[block.which][log2](call);
    at += 1 << log2;
  }
  if (chunks.end == g.chunks) activate(job, sums, {block.first, block.first + block.tokens}, place, rows);
}

void fill(const Job& job, const Block& block, Range chunks, int64_t strip, float* panel) {
  const Geometry& g = job.geometry;
  const float* x = job.x + block.first * g.pattern.cols;
  const int64_t count = chunks.end - chunks.begin;
  if (g.gathered)
    job.kernels->gather({x, g.pattern.cols, job.columns_at(strip, chunks.begin), count, int(block.tokens), block.size, panel});
  else
    job.kernels->fill({x, g.pattern.cols, chunks.begin, count, int(g.pattern.m), g.slot, int(block.tokens), block.size, panel});
}

void run_superblock(const Job& job, const Block* blocks, int count, Range vectors) {
  const Geometry& g = job.geometry;
  const int64_t fit = caches().panel_bytes / (blocks[0].size * kLanes * int64_t(sizeof(float)));  // [0] is the largest
  const int64_t ranges = (g.chunks + fit - 1) / fit;
  // Row vectors that share a panel: all of them, or those of a strip.
  const int64_t shared = g.gathered ? g.pattern.v / kLanes : g.vectors;
  const Range tokens = {blocks[0].first, blocks[count - 1].first + blocks[count - 1].tokens};
  const Sums sums = sums_of(job, tokens, vectors);
  for (int64_t r = 0; r < ranges; ++r) {
    const Range chunks = {g.chunks * r / ranges, g.chunks * (r + 1) / ranges};
    for (int64_t at = vectors.begin; at < vectors.end;) {
      const int64_t strip = at / shared, strip_end = std::min((strip + 1) * shared, vectors.end);
      for (int b = 0; b < count; ++b) fill(job, blocks[b], chunks, strip, panels[b]);
      while (at < strip_end) {
        const Range part = {at, std::min((at / kTileVectors + 1) * kTileVectors, strip_end)};
        for (int b = 0; b < count; ++b) run_tile(job, sums, blocks[b], panels[b], chunks, part);
        at = part.end;
      }
    }
  }
  if (g.pattern.moved) put_in_place(job, sums, tokens, vectors);
}

}  // namespace

void run_rows(const Job& job, Range tokens, Range vectors) {
  const int most = int(std::min(caches().second_bytes / caches().panel_bytes, int64_t(kMaxBlocks)));
  while (tokens.begin < tokens.end) {
    Block blocks[kMaxBlocks];
    int count = 0;
    for (; count < most && tokens.begin < tokens.end; ++count) {
      blocks[count] = next_block(*job.kernels, tokens.begin, tokens.end);
      tokens.begin += blocks[count].tokens;
    }
    run_superblock(job, blocks, count, vectors);
  }
}
