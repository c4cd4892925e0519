// One call of a sparse linear layer, and what both kernels need to cut it into blocks.
#pragma once
#include "kernels.h"

struct Range {
  int64_t begin, end;
};

struct Job {
  const Kernels* kernels;
  Geometry geometry;
  const uint8_t* stream;
  const float* x;
  const float* bias;  // may be null
  Activation activation;
  float* y;

  const int32_t* table_at(int64_t at) const { return reinterpret_cast<const int32_t*>(stream + at); }
  // Of a gathered stream: the columns of a strip from a chunk on.
  const int32_t* columns_at(int64_t strip, int64_t chunk) const {
    return table_at(geometry.columns_at) + (strip * geometry.chunks + chunk) * kLanes;
  }
  int64_t row_of(int64_t place) const { return geometry.pattern.moved ? table_at(geometry.rows_at)[place] : place; }

  // Where row vector `vector` starts in the stream, at chunk `chunk` (wide: group).
  const uint8_t* index_at(int64_t vector, int64_t chunk) const {
    const Geometry& g = geometry;
    const int64_t tile = vector / kTileVectors, width = g.tile_vectors(tile);
    return stream + g.index_at +
        (tile * kTileVectors * g.total_pairs + chunk * g.chunk_pairs * width + vector % kTileVectors) * kLanes;
  }
  const float* values_at(int64_t vector, int64_t chunk) const {
    const Geometry& g = geometry;
    const int64_t tile = vector / kTileVectors, width = g.tile_vectors(tile);
    return reinterpret_cast<const float*>(stream + g.values_at) +
        (tile * kTileVectors * g.total_words + chunk * g.chunk_words * width + vector % kTileVectors) * kLanes;
  }
};

struct CachePlan {
  int64_t panel_bytes;   // of the row kernel, for one block of tokens
  int64_t first_bytes;   // of a first-level cache, what the token kernel fills
  int64_t second_bytes;  // of a second-level cache
};
constexpr int64_t kMaxPanelBytes = 36 * 1024;
const CachePlan& caches();

// y of these tokens and row vectors, by one thread. run_rows: see rows.cpp; run_tokens: see tokens.cpp; where rows moved,
// it takes all row vectors.
void run_rows(const Job& job, Range tokens, Range vectors);
void run_tokens(const Job& job, Range tokens, Range vectors);
