// int8 V:2:M: the weight stream, and what one instruction set offers for it. Words are those of stream.h.
//
// The 4 columns that a strip shares in a group are 4 bytes of activations. Groups go in pairs: 8 bytes a token, and for
// every row 4 bytes of weights (2 kept of each group) with a code byte (which 2). What is computed, bit for bit, is
// `int8_linear` in sparsec/ops.py.
//
// Row vectors do not cross strips: a strip of V rows has ceil(V / 16) of them, the last filled up with rows of zeros.
//
// Layout: Header | columns | scales | sums | codes | values, each part 64-byte aligned.
//   columns  [strip][group][4] offset in the group
//   scales   [row vector][16] float
//   sums     [row vector][16] int32, of a row's values: what activations stored as x + 128 add too much, over 128
//   codes    [row vector][pair][16] bytes, low nibble = even group, high = odd; 0..5 = (0,1) (0,2) (0,3) (1,2) (1,3) (2,3)
//   values   [row vector][pair][16][4] int8: 2 of the even group, 2 of the odd: 2.5 bytes a group and row altogether
#pragma once
#include <cstdint>

namespace int8 {

constexpr int kLanes = 16;
constexpr int kCodes = 6;
constexpr uint8_t kKept[kCodes][2] = {{0, 1}, {0, 2}, {0, 3}, {1, 2}, {1, 3}, {2, 3}};
constexpr int64_t kMaxGroups = 66000;  // 127 * 127 * 2 each: their sum fits int32

struct Shape {
  int64_t m, v, rows, cols;
};

struct Header {
  uint64_t magic;
  Shape shape;
  int64_t nbytes;
  int64_t reserved[10];
};
static_assert(sizeof(Header) == 128, "the parts behind the header must stay 64-byte aligned");

// Everything that follows from the shape; cheap enough to derive in every call.
struct Geometry {
  Shape shape;
  int64_t groups, pairs, strips;
  int64_t strip_vectors, vectors;  // row vectors of a whole strip, of all
  int64_t columns_at, scales_at, sums_at, codes_at, values_at, nbytes;

  int64_t first_row(int64_t vector) const { return vector / strip_vectors * shape.v + vector % strip_vectors * kLanes; }
  int64_t real_rows(int64_t vector) const {  // fewer than 16 at the end of a strip
    const int64_t strip_end = (vector / strip_vectors + 1) * shape.v, row = first_row(vector);
    const int64_t end = strip_end < shape.rows ? strip_end : shape.rows;
    return end - row < kLanes ? end - row : kLanes;
  }
  int64_t real_columns(int64_t group) const {  // fewer than M in the last group
    return group + 1 < groups ? shape.m : shape.cols - group * shape.m;
  }
};

bool make_geometry(const Shape& shape, Geometry* geometry);
// Reads the header only; false when the buffer is not a stream of ours.
bool read_header(const void* stream, int64_t nbytes, Geometry* geometry);

// Rows of quantised activations are this long: a kernel may load 16 bytes from any group on.
inline int64_t row_bytes(int64_t cols) { return (cols + 15) / 16 * 16 + 16; }

struct Scale {
  float factor, scale;  // q = round(x * factor), x = q * scale
};

// From the bits of a row's largest magnitude; see `quantise_tokens` in sparsec/ops.py.
inline Scale scale_of(int32_t largest_bits) {
  float largest;
  __builtin_memcpy(&largest, &largest_bits, 4);
  if (largest_bits >= 0x7f800000) return {0.0f, __builtin_nanf("")};
  if (largest < 0x1p-100f) return {0.0f, 0.0f};
  return {127.0f / largest, largest / 127.0f};
}

// One row of x to int8 and its scale.
struct QuantiseCall {
  const float* x;
  int64_t cols;
  int8_t* to;
  float* scale;
};

// The 4 columns of pairs [first_pair, + pairs) of one strip, for `tokens` rows of quantised activations.
struct FillCall {
  const int8_t* x;
  int64_t x_stride;
  const uint8_t* columns;  // of the strip
  const Geometry* geometry;
  int64_t first_pair, pairs;
  int tokens, block;
  uint8_t* panel;  // [pair][token of the block][8]
};

// Codes and values of one row vector, from the first pair on, in the form that `tile` reads: kExpanded bytes a pair.
struct ExpandCall {
  const uint8_t* codes;
  const int8_t* values;
  int64_t pairs;
  uint8_t* to;
};
constexpr int kExpanded = 128;

// Sums of one row vector over a range of pairs, added to what y[token][row] holds unless the range is the first.
struct TileCall {
  const uint8_t* panel;
  const uint8_t* weights;  // expanded
  const int8_t* values;    // of the stream
  int64_t pairs;
  bool first;
  const int32_t* sums;  // of the stream, at the first row of the call
  int32_t* y;
  int64_t y_stride;
  int64_t rows, tokens;  // real ones; the rest of the block is padding and is not stored
};

// `rows` complete sums of one token become y, in place: (float(sum) * token_scale) * scale + bias.
struct FinishCall {
  void* y;
  int64_t rows;
  float token_scale;
  const float* scales;  // of `rows` rows
  const float* bias;    // may be null
};

constexpr int kMaxSizes = 6;

struct Kernels {
  double rate;              // groups x rows x tokens a nanosecond of one core, about
  int sizes[kMaxSizes + 1];  // token block sizes, ascending, 0 at the end
  void (*tile[kMaxSizes])(const TileCall&);
  void (*quantise)(const QuantiseCall&);
  void (*fill)(const FillCall&);
  void (*expand)(const ExpandCall&);
  void (*finish)(const FinishCall&);
};

const Kernels* portable_kernels();
const Kernels* avx2_kernels();  // null where this library was built for another architecture
const Kernels* vnni_kernels();

}  // namespace int8
