// What one instruction set offers: the inner loops over a tile. linear.cpp cuts the work and calls them.
#pragma once
#include "stream.h"

// y[token][row] for up to `tokens` tokens and up to 4 row vectors, over a range of chunks.
struct TileCall {
  const float* panel;    // [chunk][token of the block][16] activations
  const uint8_t* index;  // first row vector of the call, first chunk of the range
  const float* values;
  int64_t tile_vectors;  // row vectors interleaved in this tile: the stride of a step
  int64_t chunks;
  int steps, last_steps;  // last_steps: of the last chunk of this range
  int slot;
  const int* half;    // by step: 8 where its group lies in the upper half of the chunk, else 0
  bool first;         // start from the bias; otherwise add to what y holds
  const float* bias;  // may be null; like y, at the first row of the call
  float* y;
  int64_t y_stride;
  int64_t rows, tokens;  // real ones; the rest of the block is padding and is not stored
};

// The same for wide streams, straight from the activations: one row vector, up to 4 tokens, all groups.
struct GatherCall {
  const float* x;
  int64_t x_stride;
  const uint8_t* index;
  const float* values;
  int64_t tile_vectors, groups, n, m;
  const float* bias;
  float* y;
  int64_t y_stride, rows, tokens;
};
constexpr int kGatherTokens = 4;

// Copy chunks [first_chunk, first_chunk + chunks) of `tokens` rows of x into a panel for a block of `block` tokens.
// Slots without a column hold anything finite or not: no index names them.
struct FillCall {
  const float* x;
  int64_t cols;
  int64_t first_chunk, chunks;
  int m, slot;
  int tokens, block;
  float* panel;
};

// What is applied to y after the bias. The numbers are those of the C interface.
enum Activation { kNone, kRelu, kGelu, kGeluTanh, kSilu };

constexpr int kMaxSizes = 8;

struct Kernels {
  struct {
    double tile, gather;
  } rate;  // multiply-adds a nanosecond of one core, about: decides whether a call is worth a second thread
  int sizes[kMaxSizes + 1];  // token block sizes, ascending, 0 at the end
  void (*tile[kMaxSizes][3])(const TileCall&);  // by size, for 1, 2 and 4 row vectors; null: not offered (1 always is)
  void (*fill)(const FillCall&);
  void (*gather)(const GatherCall&);
  void (*activate)(Activation, float* y, int64_t count);  // in place; count need not be a multiple of anything
};

const Kernels* portable_kernels();
const Kernels* avx2_kernels();  // null where this library was built for another architecture
const Kernels* avx512_kernels();
