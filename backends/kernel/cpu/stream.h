// The packed weight stream: one byte buffer that every instruction set reads.
//
// Words used in all files of this folder:
//   row vector   16 consecutive rows of the weight; one lane a row. Rows past the end are padding with value 0.
//   tile         up to 4 row vectors, interleaved in the stream, so that a kernel may run 1, 2 or 4 of them at once.
//   step         one kept weight of each lane of a row vector: 16 values and 16 indices.
//   slot         room of one group of M columns in a chunk: M rounded up to a power of two (M <= 16).
//   chunk        16 / slot consecutive groups. The activations of a chunk fill one vector of 16 floats, each group at
//                its slot, so a 4-bit index names a kept column. That makes V:N:M and N:M the same thing to a kernel.
//   gathered     V:2:M with M > 16, V a multiple of 16: a group's slot holds only the 4 columns of its strip.
//   wide         any other M > 16: one byte an index, and the token kernel only.
//
// Layout: Header | columns (V:N:M, for gathering and unpacking) | indices | values, each part 64-byte aligned.
//   chunks: indices [tile][chunk][pair of steps][row vector][16] bytes, low nibble = even step, high = odd step
//   wide:   indices [tile][group][n][row vector][16] bytes, offset in the group
//   values          [tile][chunk][step][row vector][16] float: 4.5 bytes a kept weight altogether (wide: 5)
//   bfloat16 values [tile][chunk][pair of steps][row vector][16] words of 32 bits, low half = even step, high = odd step,
//                   so that a shift or a mask makes floats of 16 values: 2.5 bytes a kept weight (wide: 3)
#pragma once
#include <cstdint>

constexpr int kLanes = 16;
constexpr int kTileVectors = 4;
constexpr int kMaxSteps = 16;  // of one chunk: n <= slot
enum ValueType { kFloat32, kBfloat16 };

struct Pattern {
  int64_t n, m, v;  // v = 0: N:M; v >= 1: V:2:M
  int64_t rows, cols;
  int64_t values = kFloat32;  // a ValueType
};

struct Header {
  uint64_t magic;
  Pattern pattern;
  int64_t nbytes;
  int64_t reserved[8];
};
static_assert(sizeof(Header) == 128, "the parts behind the header must stay 64-byte aligned");

// Everything that follows from the pattern; cheap enough to derive in every call.
struct Geometry {
  Pattern pattern;
  int64_t groups, strips, vectors;  // vectors: row vectors
  bool gathered;
  int slot;  // 0: wide; the next seven then count a group as a chunk
  int groups_per_chunk;
  int chunk_columns;      // that the indices of a chunk reach: of x, or (gathered) of the columns copied from it
  int64_t chunks;
  int steps, last_steps;  // of a chunk; of the last chunk, which may hold fewer groups
  int chunk_pairs;
  int chunk_words;        // 64-byte vectors of values: one a step, or (bfloat16) one a pair
  int half[kMaxSteps];    // by step of a chunk: 8 where its group lies in the upper half, else 0
  uint8_t column[kLanes];  // by index: which of the chunk's columns, empty slots not counted; always one of them
  int64_t total_steps, total_pairs, total_words;  // of one row vector; a wide stream has one "pair" a step
  int64_t columns_at, index_at, values_at, nbytes;

  int tile_vectors(int64_t tile) const {
    const int64_t left = vectors - tile * kTileVectors;
    return left < kTileVectors ? int(left) : kTileVectors;
  }
  int64_t real_columns(int64_t group) const {  // fewer than M in the last group
    return group + 1 < groups ? pattern.m : pattern.cols - group * pattern.m;
  }
};

// False when the pattern is not one of ours, or too large to address.
bool make_geometry(const Pattern& pattern, Geometry* geometry);
// Reads the header only; false when the buffer is not a stream of ours.
bool read_header(const void* stream, int64_t nbytes, Geometry* geometry);
