// Build, check and take apart streams. Runs once a weight, so it is plain code without intrinsics.
#include "stream.h"

#include <algorithm>
#include <cstring>

namespace {

constexpr uint64_t kMagic = 0x3330304350535053;  // "SPSPC003": the last digits are the format version
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
bool padded(const Geometry& g, int64_t group, int64_t k) { return k >= g.real_slots(group); }

int32_t* numbers(uint8_t* stream, int64_t at) { return reinterpret_cast<int32_t*>(stream + at); }
const int32_t* numbers(const uint8_t* stream, int64_t at) { return reinterpret_cast<const int32_t*>(stream + at); }

// Where a gathered stream holds the columns of a group.
int64_t gathered_at(const Geometry& g, int64_t strip, int64_t group) { return strip * g.chunks * kLanes + group * 4; }
int64_t window_at(const Geometry& g, int64_t strip, int64_t group) { return g.columns_at + (strip * g.groups + group) * 4; }

// A column that a group shares, of the weight.
int32_t read_column(const Geometry& g, const uint8_t* stream, int64_t strip, int64_t group, int64_t k) {
  if (g.gathered) return numbers(stream, g.columns_at)[gathered_at(g, strip, group) + k];
  return int32_t(group * g.pattern.m + stream[window_at(g, strip, group) + k]);
}

void write_column(const Geometry& g, int32_t column, uint8_t* stream, int64_t strip, int64_t group, int64_t k) {
  if (g.gathered)
    numbers(stream, g.columns_at)[gathered_at(g, strip, group) + k] = column;
  else
    stream[window_at(g, strip, group) + k] = uint8_t(column - group * g.pattern.m);
}

template <class F>
void each_column(const Geometry& g, F f) {
  for (int64_t strip = 0; strip < g.strips; ++strip)
    for (int64_t group = 0; group < g.groups; ++group)
      for (int64_t k = 0; k < 4; ++k) f(strip, group, k);
}

// Gathering reads all 4 columns of a group, also those no row keeps.
bool column_in_range(const Geometry& g, int64_t group, int64_t column) {
  const bool strip = g.pattern.columns == kStrip;
  const int64_t first = strip ? 0 : group * g.pattern.m, count = strip ? g.pattern.cols : g.real_columns(group);
  return column >= first && column < first + count;
}

// The entries that fill up columns, rows and places are read too.
bool spare_are_zero(const Geometry& g, const uint8_t* stream) {
  const auto zero = [&](int64_t at, int64_t first, int64_t end) {
    const int32_t* table = numbers(stream, at);
    return std::all_of(table + first, table + end, [](int32_t number) { return number == 0; });
  };
  for (int64_t strip = 0; g.gathered && strip < g.strips; ++strip)
    if (!zero(g.columns_at, gathered_at(g, strip, g.groups), gathered_at(g, strip + 1, 0))) return false;
  const int64_t rows = g.pattern.rows, end = g.vectors * kLanes;
  return !g.pattern.moved || (zero(g.rows_at, rows, end) && zero(g.places_at, rows, end));
}

// The place of each row, from the row of each place; false unless every row has one.
bool invert(const int32_t* rows, int64_t count, int32_t* places) {
  std::fill(places, places + count, -1);
  for (int64_t place = 0; place < count; ++place) {
    if (rows[place] < 0 || rows[place] >= count || places[rows[place]] >= 0) return false;
    places[rows[place]] = int32_t(place);
  }
  return true;
}

}  // namespace

bool make_geometry(const Pattern& p, Geometry* g) {
  const bool nm = p.v == 0 && p.n >= 1 && p.n <= p.m && p.m <= 256;
  const bool vnm = p.v >= 1 && p.n == 2 && p.m >= 4 && p.m <= 256;
  const bool strip = p.columns == kStrip;
  if ((p.values != kFloat32 && p.values != kBfloat16) || (p.columns != kWindow && !strip)) return false;
  if ((strip && !(vnm && p.v % kLanes == 0)) || (p.moved != 0 && !(strip && p.moved == 1))) return false;
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
  g->gathered = vnm && (strip || p.m > 16) && p.v % kLanes == 0;
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
  const int64_t column_bytes = g->gathered ? g->strips * g->chunks * kLanes * int64_t(sizeof(int32_t)) : g->strips * g->groups * 4;
  const int64_t table_bytes = p.moved ? g->vectors * kLanes * int64_t(sizeof(int32_t)) : 0;
  g->rows_at = align64(g->columns_at + column_bytes);
  g->places_at = g->rows_at + table_bytes;
  g->index_at = g->places_at + table_bytes;
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

int64_t sparsec_stream_nbytes(const Pattern* pattern) {
  Geometry g;
  return make_geometry(*pattern, &g) ? g.nbytes : -1;
}

// By place: values [rows][groups][n] float or bfloat16, positions [rows][groups][n] bytes. columns [strips][groups][4], of
// the weight (V:2:M); rows [place] (where rows moved).
// 0: done; 1: unknown pattern or wrong nbytes; 2: an index out of range, a position that names padding, a row twice.
int sparsec_pack(uint8_t* stream, int64_t nbytes, const Pattern* pattern, const void* values, const uint8_t* positions,
                 const int32_t* columns, const int32_t* rows) {
  Geometry g;
  if (!make_geometry(*pattern, &g) || g.nbytes != nbytes) return 1;
  const int64_t n = g.pattern.n, v = g.pattern.v;
  bool in_range = true;
  each_column(g, [&, at = columns](int64_t, int64_t group, int64_t) mutable { in_range &= column_in_range(g, group, *at++); });
  if (!in_range) return 2;
  std::memset(stream, 0, size_t(nbytes));
  const Header header = {kMagic, g.pattern, nbytes, {}};
  std::memcpy(stream, &header, sizeof(header));
  each_column(g, [&, at = columns](int64_t strip, int64_t group, int64_t k) mutable { write_column(g, *at++, stream, strip, group, k); });
  if (g.pattern.moved) {
    std::memcpy(stream + g.rows_at, rows, size_t(g.pattern.rows) * sizeof(int32_t));
    if (!invert(rows, g.pattern.rows, numbers(stream, g.places_at))) return 2;
  }
  const size_t value_bytes = g.pattern.values == kBfloat16 ? 2 : 4;
  uint8_t* index = stream + g.index_at;
  for (int64_t row = 0; row < g.pattern.rows; ++row) {
    for (int64_t group = 0; group < g.groups; ++group) {
      const int64_t real = g.real_slots(group);
      const int32_t* shared = v ? columns + (row / v * g.groups + group) * 4 : nullptr;
      for (int64_t k = 0; k < n; ++k) {
        const int64_t at = (row * g.groups + group) * n + k;
        int64_t position = positions[at];
        if (padded(g, group, k)) {
          if (position != k) return 2;
          position = real - 1;
        }
        if (position >= real) return 2;
        if (v && !g.gathered) position = shared[position] - group * g.pattern.m;
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

int sparsec_unpack(const uint8_t* stream, int64_t nbytes, void* values, uint8_t* positions, int32_t* columns,
                   int32_t* rows) {
  Geometry g;
  if (!read_header(stream, nbytes, &g)) return 1;
  const Pattern& p = g.pattern;
  const size_t value_bytes = p.values == kBfloat16 ? 2 : 4;
  each_column(g, [&, at = columns](int64_t strip, int64_t group, int64_t k) mutable { *at++ = read_column(g, stream, strip, group, k); });
  if (p.moved) std::memcpy(rows, stream + g.rows_at, size_t(p.rows) * sizeof(int32_t));
  for (int64_t row = 0; row < p.rows; ++row) {
    for (int64_t group = 0; group < g.groups; ++group) {
      const int32_t* shared = p.v ? columns + (row / p.v * g.groups + group) * 4 : nullptr;
      for (int64_t k = 0; k < p.n; ++k) {
        const Place place = locate(g, row, group, k);
        const int64_t at = (row * g.groups + group) * p.n + k;
        const int stored = stream[g.index_at + place.index] >> place.shift;
        int64_t position = (g.slot ? stored & 15 : stored) - place.base;
        if (p.v && !g.gathered) {
          int which = 0;
          while (which < 3 && shared[which] != group * p.m + position) ++which;
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
  bool in_range = spare_are_zero(g, stream);
  each_column(g, [&](int64_t strip, int64_t group, int64_t k) {
    in_range &= column_in_range(g, group, read_column(g, stream, strip, group, k));
  });
  const int32_t *rows = numbers(stream, g.rows_at), *places = numbers(stream, g.places_at);
  for (int64_t place = 0; g.pattern.moved && in_range && place < g.pattern.rows; ++place)
    in_range = rows[place] >= 0 && rows[place] < g.pattern.rows && places[rows[place]] == place;
  if (!in_range) return 2;
  if (g.slot) return 0;
  for (int64_t row = 0; row < g.vectors * kLanes; ++row)
    for (int64_t group = 0; group < g.groups; ++group)
      for (int64_t k = 0; k < g.pattern.n; ++k)
        if (stream[g.index_at + locate(g, row, group, k).index] >= g.real_columns(group)) return 2;
  return 0;
}

}  // extern "C"
