// Build, check and take apart int8 streams. Runs once a weight, so it is plain code without intrinsics.
#include <cmath>
#include <cstring>

#include "int8.h"

namespace int8 {

namespace {

constexpr uint64_t kMagic = 0x3130303849505053;  // "SPPI8001": the last digits are the format version
constexpr int64_t kMaxDim = int64_t(1) << 31;

int64_t align64(int64_t nbytes) { return (nbytes + 63) / 64 * 64; }

// Where group `group` of a row lives.
struct Place {
  int64_t code, value;  // bytes from codes_at and values_at; two values follow each other
  int shift;            // of the nibble
};

Place locate(const Geometry& g, int64_t row, int64_t group) {
  const int64_t in_strip = row % g.shape.v, lane = in_strip % kLanes;
  const int64_t vector = row / g.shape.v * g.strip_vectors + in_strip / kLanes;
  const int64_t at = (vector * g.pairs + group / 2) * kLanes + lane;
  return {at, at * 4 + group % 2 * 2, int(group % 2) * 4};
}

// The place of a row in the parts that have one entry a row.
int64_t lane_of(const Geometry& g, int64_t row) {
  return (row / g.shape.v * g.strip_vectors + row % g.shape.v / kLanes) * kLanes + row % g.shape.v % kLanes;
}

int code_of(const uint8_t* kept) {
  for (int code = 0; code < kCodes; ++code)
    if (kKept[code][0] == kept[0] && kKept[code][1] == kept[1]) return code;
  return -1;
}

bool columns_in_range(const Geometry& g, const uint8_t* columns) {
  for (int64_t i = 0; i < g.strips * g.groups * 4; ++i)
    if (columns[i] >= g.real_columns(i / 4 % g.groups)) return false;
  return true;
}

}  // namespace

bool make_geometry(const Shape& s, Geometry* g) {
  if (s.m < 4 || s.m > 256 || s.v < 1 || s.v > kMaxDim || s.rows < 1 || s.rows > kMaxDim || s.cols < 1) return false;
  if ((s.cols - 1) / s.m >= kMaxGroups) return false;
  *g = Geometry{};
  g->shape = s;
  g->groups = (s.cols + s.m - 1) / s.m;
  g->pairs = (g->groups + 1) / 2;
  g->strips = (s.rows + s.v - 1) / s.v;
  g->strip_vectors = (s.v + kLanes - 1) / kLanes;
  const int64_t last_rows = s.rows - (g->strips - 1) * s.v;
  g->vectors = (g->strips - 1) * g->strip_vectors + (last_rows + kLanes - 1) / kLanes;
  const int64_t lanes = g->vectors * kLanes;  // at most 2^35, with fewer than 2^16 pairs of 5 bytes: no overflow
  g->columns_at = sizeof(Header);
  g->scales_at = align64(g->columns_at + g->strips * g->groups * 4);
  g->sums_at = g->scales_at + lanes * 4;
  g->codes_at = g->sums_at + lanes * 4;
  g->values_at = align64(g->codes_at + lanes * g->pairs);
  g->nbytes = g->values_at + lanes * g->pairs * 4;
  return true;
}

bool read_header(const void* stream, int64_t nbytes, Geometry* geometry) {
  if (nbytes < int64_t(sizeof(Header))) return false;
  Header header;
  std::memcpy(&header, stream, sizeof(header));
  if (header.magic != kMagic || header.nbytes != nbytes) return false;
  return make_geometry(header.shape, geometry) && geometry->nbytes == nbytes;
}

}  // namespace int8

using namespace int8;

extern "C" {

int64_t sparsec_int8_nbytes(int64_t m, int64_t v, int64_t rows, int64_t cols) {
  Geometry g;
  return make_geometry({m, v, rows, cols}, &g) ? g.nbytes : -1;
}

// values [rows][groups][2] int8, positions [rows][groups][2], columns [strips][groups][4] bytes, scales [rows] float.
// 0: done; 1: unknown shape or wrong nbytes; 2: an index out of range.
int sparsec_int8_pack(uint8_t* stream, int64_t nbytes, int64_t m, int64_t v, int64_t rows, int64_t cols,
                      const int8_t* values, const uint8_t* positions, const uint8_t* columns, const float* scales) {
  Geometry g;
  if (!make_geometry({m, v, rows, cols}, &g) || g.nbytes != nbytes) return 1;
  if (!columns_in_range(g, columns)) return 2;
  std::memset(stream, 0, size_t(nbytes));
  const Header header = {kMagic, g.shape, nbytes, {}};
  std::memcpy(stream, &header, sizeof(header));
  std::memcpy(stream + g.columns_at, columns, size_t(g.strips * g.groups * 4));
  float* packed_scales = reinterpret_cast<float*>(stream + g.scales_at);
  int32_t* sums = reinterpret_cast<int32_t*>(stream + g.sums_at);
  for (int64_t row = 0; row < rows; ++row) {
    packed_scales[lane_of(g, row)] = scales[row];
    for (int64_t group = 0; group < g.groups; ++group) {
      const int64_t at = (row * g.groups + group) * 2;
      const int code = code_of(positions + at);
      if (code < 0) return 2;
      const Place place = locate(g, row, group);
      stream[g.codes_at + place.code] |= uint8_t(code << place.shift);
      std::memcpy(stream + g.values_at + place.value, values + at, 2);
      sums[lane_of(g, row)] += values[at] + values[at + 1];
    }
  }
  return 0;
}

int sparsec_int8_describe(const uint8_t* stream, int64_t nbytes, Shape* shape) {
  Geometry g;
  if (!read_header(stream, nbytes, &g)) return 1;
  *shape = g.shape;
  return 0;
}

int sparsec_int8_unpack(const uint8_t* stream, int64_t nbytes, int8_t* values, uint8_t* positions, uint8_t* columns,
                        float* scales) {
  Geometry g;
  if (!read_header(stream, nbytes, &g)) return 1;
  std::memcpy(columns, stream + g.columns_at, size_t(g.strips * g.groups * 4));
  for (int64_t row = 0; row < g.shape.rows; ++row) {
    scales[row] = reinterpret_cast<const float*>(stream + g.scales_at)[lane_of(g, row)];
    for (int64_t group = 0; group < g.groups; ++group) {
      const int64_t at = (row * g.groups + group) * 2;
      const Place place = locate(g, row, group);
      const int code = stream[g.codes_at + place.code] >> place.shift & 15;
      if (code >= kCodes) return 2;
      std::memcpy(positions + at, kKept[code], 2);
      std::memcpy(values + at, stream + g.values_at + place.value, 2);
    }
  }
  return 0;
}

// 0 when no kernel can read outside the stream or outside a row of activations, and all codes and scales mean something.
int sparsec_int8_check(const uint8_t* stream, int64_t nbytes) {
  Geometry g;
  if (!read_header(stream, nbytes, &g)) return 1;
  if (!columns_in_range(g, stream + g.columns_at)) return 2;
  for (int64_t i = 0; i < g.vectors * kLanes * g.pairs; ++i) {
    const uint8_t code = stream[g.codes_at + i];
    if ((code & 15) >= kCodes || code >> 4 >= kCodes) return 2;
  }
  for (int64_t i = 0; i < g.vectors * kLanes; ++i)
    if (!std::isfinite(reinterpret_cast<const float*>(stream + g.scales_at)[i])) return 2;
  return 0;
}

}  // extern "C"
