// What one instruction set offers: the inner loops. rows.cpp and tokens.cpp cut the work and call them.
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
  bool bf16;          // two values a word
  bool first;         // start from the bias; otherwise add to what y holds
  const float* bias;  // may be null; like y, at the first row of the call
  float* y;
  int64_t y_stride;
  int64_t rows, tokens;  // real ones; the rest of the block is padding and is not stored
};

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

// The same for gathered streams: columns [chunk][16] of x. The panel need not be aligned.
struct GatherCall {
  const float* x;
  int64_t cols;
  const int32_t* columns;
  int64_t chunks;
  int tokens, block;
  float* panel;
};

// What is applied to y after the bias. The numbers are those of the C interface.
enum Activation { kNone, kRelu, kGelu, kGeluTanh, kSilu };

// The token kernel, in three parts. A block is `block` tokens: 1 to kMaxVectors vectors of them.
constexpr int kMaxVectors = 8;

// Columns of up to `block` rows of x into a panel [column][block].
struct TransposeIn {
  const float* x;
  int64_t x_stride, columns;
  int tokens, block;
  float* panel;
};

// Some columns of transposed activations, [column][block], into a panel.
struct CopyCall {
  const float* from;
  const int32_t* columns;
  int64_t count;
  int block;
  float* panel;
};

// The indices and values of one row vector over a range of chunks, [step][16]: an index becomes the distance in bytes
// of its activations from the panel.
struct UnpackCall {
  const uint8_t* index;
  const float* values;
  int64_t tile_vectors, chunks;
  int steps, last_steps, chunk_columns;
  const uint8_t* column;  // Geometry::column; null: an index is a byte and the column itself
  int column_bytes;  // of the panel
  bool bf16;         // two values a word; they become floats
  uint16_t* offsets;
  float* weights;
};

// sums [row][block] of one row vector over the same range.
struct SumCall {
  const float* panel;
  const uint16_t* offsets;
  const float* weights;
  int64_t steps;
  const float* from;  // null: start from the bias
  const float* bias;  // [16]
  float* to;          // may be `from`; [16][block], also when fewer rows are real
  int rows;
  const void* ahead;  // the first of `ahead_count` places that are needed next, and how far apart they are
  int64_t ahead_stride, ahead_count;
};

// sums [place][block] to y[token][row], up to 16 rows.
struct TransposeOut {
  const float* sums;
  const int32_t* places;  // [16] of the rows
  int block, tokens, rows;
  float* y;
  int64_t y_stride;
};

struct TokenKernels {
  int width;  // tokens of a vector
  void (*sum[kMaxVectors])(const SumCall&);  // for blocks of 1, 2, ... vectors
  void (*unpack)(const UnpackCall&);
  void (*transpose_in)(const TransposeIn&);
  void (*copy)(const CopyCall&);
  void (*transpose_out)(const TransposeOut&);
};

constexpr int kMaxSizes = 8;

struct Kernels {
  double rate;  // multiply-adds a nanosecond of one core, about: decides whether a call is worth a second thread
  int sizes[kMaxSizes + 1];  // of the row kernel: token block sizes, ascending, 0 at the end
  void (*tile[kMaxSizes][3])(const TileCall&);  // by size, for 1, 2 and 4 row vectors; null: not offered (1 always is)
  void (*fill)(const FillCall&);
  void (*gather)(const GatherCall&);
  TokenKernels tokens;
  void (*activate)(Activation, float* y, int64_t count);  // in place; count need not be a multiple of anything
};

const Kernels* portable_kernels();
const Kernels* avx2_kernels();  // null where this library was built for another architecture
const Kernels* avx512_kernels();
