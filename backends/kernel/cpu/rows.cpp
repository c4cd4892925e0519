// The row kernel: lanes are 16 rows of the weight. For few tokens, when reading the weights takes the time.
//
// Loops, outermost first:
//   superblock   the tokens whose panels fit half of a second-level cache
//   chunk range  so that the panel of one block stays in the first-level cache
//   tile, block  a tile's weights are read from memory once and then serve every block of the superblock
#include <algorithm>

#include "job.h"

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

// The activation of `rows` rows (those past the last one left out) from `row` on, of `tokens` tokens.
void activate(const Job& job, int64_t row, int64_t rows, int64_t token, int64_t tokens) {
  if (job.activation == kNone) return;
  const int64_t stride = job.geometry.pattern.rows;
  rows = std::min(rows, stride - row);
  for (int64_t t = token; t < token + tokens; ++t) job.kernels->activate(job.activation, job.y + t * stride + row, rows);
}

// Row vectors [at, end) of one tile through one block.
void run_tile(const Job& job, const Block& block, const float* panel, Range chunks, Range vectors) {
  const Geometry& g = job.geometry;
  const int64_t rows = g.pattern.rows;
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
  call.y_stride = rows;
  call.tokens = block.tokens;
  for (int64_t at = vectors.begin; at < vectors.end;) {
    int log2 = 2;
    while ((1 << log2) > vectors.end - at || !job.kernels->tile[block.which][log2]) --log2;
    const int64_t row = at * kLanes;
    call.index = job.index_at(at, chunks.begin);
    call.values = job.values_at(at, chunks.begin);
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
        const Range part = {at, std::min((at / kTileVectors + 1) * kTileVectors, strip_end)};
        for (int b = 0; b < count; ++b) run_tile(job, blocks[b], panels[b], chunks, part);
        at = part.end;
      }
    }
  }
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
