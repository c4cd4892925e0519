// Build, check and take apart streams. Runs once a weight, so it is plain code without intrinsics.
#include "stream.h"

#include <algorithm>
#include <cstring>

namespace {

constexpr uint64_t kMagic = 0x3230304350535053;  // "SPSPC002": the last digits are the format version
constexpr int64_t kMaxDim = int64_t(1) << 31;

int64_t align64(int64_t nbytes) { return (nbytes + 63) / 64 * 64; }

// Where the step-th weight of a row lives. Steps count through all groups: step = group * n + slot in group.
struct Place {
  int64_t value;  // in bytes from values_at
  int64_t index;  // in bytes from index_at
  int shift;      // 4 when the index is a high nibble
  int base;       // first column of the group in its chunk
};

Place locate(const Geometry& g, int64_t row, int64_t group, int64_t k) {
  const int64_t vector = row / kLanes, tile = vector / kTileVectors, width = g.tile_vectors(tile);
  const int64_t lane = (vector % kTileVectors) * kLanes + row % kLanes;
  const int64_t step = group * g.pattern.n + k, chunk = group / g.groups_per_chunk, in_chunk = step - chunk * g.steps;
  const bool bf16 = g.pattern.values == kBfloat16;
  const int64_t word = chunk * g.chunk_words + (bf16 ? in_chunk / 2 : in_chunk);
  Place place;
  place.value = ((tile * kTileVectors * g.total_words + word * width) * kLanes + lane) * 4 + (bf16 ? in_chunk % 2 * 2 : 0);
  int64_t pair = step;
  place.shift = place.base = 0;
  if (g.slot) {
    pair = chunk * g.chunk_pairs + in_chunk / 2;
    place.shift = int(in_chunk % 2) * 4;
    place.base = int(group % g.groups_per_chunk) * g.slot;
  }
  place.index = (tile * kTileVectors * g.total_pairs + pair * width) * kLanes + lane;
  return place;
}

// A position may name a padding slot of the tail group only where the format leaves no choice: N:M lists t..n-1 after
// the t real ones, V:2:M with one real column lists (0, 1). Anything else could not be unpacked bit for bit.
bool padded(const Geometry& g, int64_t group, int64_t k) { return k >= g.real_columns(group); }

// Gathering reads all 4 columns of a group, also those no row keeps.
bool columns_in_range(const Geometry& g, const uint8_t* columns) {
  for (int64_t i = 0; i < g.strips * g.groups * 4; ++i)
    if (columns[i] >= g.real_columns(i / 4 % g.groups)) return false;
  return true;
}

}  // namespace

bool make_geometry(const Pattern& p, Geometry* g) {
  const bool nm = p.v == 0 && p.n >= 1 && p.n <= p.m && p.m <= 256;
  const bool vnm = p.v >= 1 && p.n == 2 && p.m >= 4 && p.m <= 256;
  if (p.values != kFloat32 && p.values != kBfloat16) return false;
  if (!(nm || vnm) || p.rows < 1 || p.cols < 1 || p.rows > kMaxDim || p.cols > kMaxDim || p.v > kMaxDim) return false;
  *g = Geometry{};
  g->pattern = p;
  g->groups = (p.cols + p.m - 1) / p.m;
  g->strips = vnm ? (p.rows + p.v - 1) / p.v : 0;
  g->vectors = (p.rows + kLanes - 1) / kLanes;
  g->total_steps = g->groups * p.n;
  g->total_pairs = g->total_steps;
  g->groups_per_chunk = 1;
  g->chunk_columns = int(p.m);
  g->chunks = g->groups;
  g->steps = g->last_steps = g->chunk_pairs = int(p.n);
  g->gathered = vnm && p.m > 16 && p.v % kLanes == 0;
  if (p.m <= 16 || g->gathered) {
    g->slot = g->gathered ? 4 : 1;
    while (!g->gathered && g->slot < p.m) g->slot *= 2;
    g->groups_per_chunk = 16 / g->slot;
    g->chunks = (g->groups + g->groups_per_chunk - 1) / g->groups_per_chunk;
    g->steps = int(g->groups_per_chunk * p.n);
    g->chunk_pairs = (g->steps + 1) / 2;
    g->chunk_columns = g->gathered ? 16 : int(g->groups_per_chunk * p.m);
    for (int s = 0; s < g->steps; ++s) g->half[s] = s / int(p.n) * g->slot & 8;
    const int used = g->gathered ? g->slot : int(p.m);  // of a slot
    for (int i = 0; i < kLanes; ++i) g->column[i] = uint8_t(i / g->slot * used + std::min(i % g->slot, used - 1));
    g->last_steps = int(g->total_steps - (g->chunks - 1) * g->steps);
    g->total_pairs = (g->chunks - 1) * g->chunk_pairs + (g->last_steps + 1) / 2;
  }
  const int words_of_two = p.values == kBfloat16 ? 1 : 2;
  g->chunk_words = (g->steps * words_of_two + 1) / 2;
  g->total_words = (g->chunks - 1) * g->chunk_words + (g->last_steps * words_of_two + 1) / 2;
  // A step of a row vector takes at most 5 bytes a lane; beyond this the sums below could overflow.
  if (g->vectors > (int64_t(1) << 60) / (5 * kLanes) / g->total_steps) return false;
  g->columns_at = sizeof(Header);
  g->index_at = align64(g->columns_at + g->strips * g->groups * 4);
  g->values_at = align64(g->index_at + g->vectors * g->total_pairs * kLanes);
  g->nbytes = g->values_at + g->vectors * g->total_words * kLanes * int64_t(sizeof(float));
  return true;
}

bool read_header(const void* stream, int64_t nbytes, Geometry* geometry) {
  if (nbytes < int64_t(sizeof(Header))) return false;
  Header header;
  std::memcpy(&header, stream, sizeof(header));
  if (header.magic != kMagic || header.nbytes != nbytes) return false;
  return make_geometry(header.pattern, geometry) && geometry->nbytes == nbytes;
}

extern "C" {

int64_t sparsec_stream_nbytes(int64_t n, int64_t m, int64_t v, int64_t rows, int64_t cols, int value_type) {
  Geometry g;
  return make_geometry({n, m, v, rows, cols, value_type}, &g) ? g.nbytes : -1;
}

// values [rows][groups][n] float or bfloat16, positions [rows][groups][n] bytes, columns [strips][groups][4] bytes (V:2:M).
// 0: done; 1: unknown pattern or wrong nbytes; 2: an index out of range or a position that names padding.
int sparsec_pack(uint8_t* stream, int64_t nbytes, int64_t n, int64_t m, int64_t v, int64_t rows, int64_t cols,
                 int value_type, const void* values, const uint8_t* positions, const uint8_t* columns) {
  Geometry g;
  if (!make_geometry({n, m, v, rows, cols, value_type}, &g) || g.nbytes != nbytes) return 1;
  if (v && !columns_in_range(g, columns)) return 2;
  std::memset(stream, 0, size_t(nbytes));
  const Header header = {kMagic, g.pattern, nbytes, {}};
  std::memcpy(stream, &header, sizeof(header));
  if (v) std::memcpy(stream + g.columns_at, columns, size_t(g.strips * g.groups * 4));
  const size_t value_bytes = value_type == kBfloat16 ? 2 : 4;
  uint8_t* index = stream + g.index_at;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t group = 0; group < g.groups; ++group) {
      const int64_t real = g.real_columns(group);
      const uint8_t* shared = v ? columns + (row / v * g.groups + group) * 4 : nullptr;
      for (int64_t k = 0; k < n; ++k) {
        const int64_t at = (row * g.groups + group) * n + k;
        int64_t position = positions[at];
        if (padded(g, group, k)) {
          if (position != k) return 2;
          position = real - 1;
        } else {
          if (v && (position >= 4 || position >= real)) return 2;
          position = v && !g.gathered ? shared[position] : position;
        }
        if (position >= real) return 2;
        const Place place = locate(g, row, group, k);
        std::memcpy(stream + g.values_at + place.value, static_cast<const char*>(values) + at * int64_t(value_bytes),
                    value_bytes);
        index[place.index] |= uint8_t((place.base + position) << place.shift);
      }
    }
  }
  return 0;
}

int sparsec_describe(const uint8_t* stream, int64_t nbytes, Pattern* pattern) {
  Geometry g;
  if (!read_header(stream, nbytes, &g)) return 1;
  *pattern = g.pattern;
  return 0;
}

int sparsec_unpack(const uint8_t* stream, int64_t nbytes, void* values, uint8_t* positions, uint8_t* columns) {
  Geometry g;
  if (!read_header(stream, nbytes, &g)) return 1;
  const Pattern& p = g.pattern;
  const size_t value_bytes = p.values == kBfloat16 ? 2 : 4;
  if (p.v) std::memcpy(columns, stream + g.columns_at, size_t(g.strips * g.groups * 4));
  for (int64_t row = 0; row < p.rows; ++row) {
    for (int64_t group = 0; group < g.groups; ++group) {
      const uint8_t* shared = p.v ? columns + (row / p.v * g.groups + group) * 4 : nullptr;
      for (int64_t k = 0; k < p.n; ++k) {
        const Place place = locate(g, row, group, k);
        const int64_t at = (row * g.groups + group) * p.n + k;
        const int stored = stream[g.index_at + place.index] >> place.shift;
        int64_t position = (g.slot ? stored & 15 : stored) - place.base;
        if (p.v && !g.gathered) {
          int which = 0;
          while (which < 3 && shared[which] != position) ++which;
          position = which;
        }
        positions[at] = uint8_t(padded(g, group, k) ? k : position);
        std::memcpy(static_cast<char*>(values) + at * int64_t(value_bytes), stream + g.values_at + place.value,
                    value_bytes);
      }
    }
  }
  return 0;
}

// 0 when no kernel can read outside the stream or outside a row of activations. A nibble cannot leave its chunk;
// a byte can leave its group.
int sparsec_check(const uint8_t* stream, int64_t nbytes) {
  Geometry g;
  if (!read_header(stream, nbytes, &g)) return 1;
  if (g.pattern.v && !columns_in_range(g, stream + g.columns_at)) return 2;
  if (g.slot) return 0;
  for (int64_t row = 0; row < g.vectors * kLanes; ++row)
    for (int64_t group = 0; group < g.groups; ++group)
      for (int64_t k = 0; k < g.pattern.n; ++k)
        if (stream[g.index_at + locate(g, row, group, k).index] >= g.real_columns(group)) return 2;
  return 0;
}

}  // extern "C"
