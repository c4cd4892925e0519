// The packed weight stream: one byte buffer that every instruction set reads.
//
// Words used in all files of this folder:
//   row vector   16 consecutive rows of the weight; one lane a row. Rows past the end are padding with value 0.
//   tile         up to 4 row vectors, interleaved in the stream, so that a kernel may run 1, 2 or 4 of them at once.
//   step         one kept weight of each lane of a row vector: 16 values and 16 indices.
//   slot         room of one group of M columns in a chunk: M rounded up to a power of two (M <= 16).
//   chunk        16 / slot consecutive groups. The activations of a chunk fill one vector of 16 floats, each group at
//                its slot, so a 4-bit index names a kept column. That makes V:N:M and N:M the same thing to a kernel.
//   place        a row as it is stored: place p belongs to strip p / V. Where rows moved, a table says which row it is.
//   gathered     V a multiple of 16, and a strip pattern or M > 16: a group's slot holds only the 4 columns of its strip.
//   wide         any other M > 16: one byte an index, and the token kernel only.
//
// Layout: Header | columns (V:N:M) | rows, places (where rows moved) | indices | values, each part 64-byte aligned.
//   columns [strip][group][4] bytes, offset in the group, for unpacking only
//           gathered: [strip][chunk][16] int32, column of the weight; past the last group 0
//   rows    [place] int32, and its inverse, places [row] int32; both as long as the row vectors are, filled up with 0
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
enum Columns { kWindow, kStrip };

struct Pattern {
  int64_t n, m, v;  // v = 0: N:M; v >= 1: V:2:M
  int64_t rows, cols;
  int64_t values = kFloat32;   // a ValueType
  int64_t columns = kWindow;   // V:2:M: where the 4 columns of a group come from
  int64_t moved = 0;           // 1: rows are not stored in their order
};

struct Header {
  uint64_t magic;
  Pattern pattern;
  int64_t nbytes;
  int64_t reserved[6];
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
  int64_t columns_at, rows_at, places_at, index_at, values_at, nbytes;

  int tile_vectors(int64_t tile) const {
    const int64_t left = vectors - tile * kTileVectors;
    return left < kTileVectors ? int(left) : kTileVectors;
  }
  int64_t real_columns(int64_t group) const {  // fewer than M in the last group
    return group + 1 < groups ? pattern.m : pattern.cols - group * pattern.m;
  }
  // What positions of a group may name: columns of N:M, else of the 4 shared ones those that are there.
  int64_t real_slots(int64_t group) const {
    if (!pattern.v) return real_columns(group);
    const int64_t left = pattern.columns == kStrip ? pattern.cols - group * 4 : real_columns(group);
    return left < 4 ? left : 4;
  }
};

// False when the pattern is not one of ours, or too large to address.
bool make_geometry(const Pattern& pattern, Geometry* geometry);
// Reads the header only; false when the buffer is not a stream of ours.
bool read_header(const void* stream, int64_t nbytes, Geometry* geometry);
