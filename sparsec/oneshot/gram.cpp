// Adds x^T x0 to a matrix on the tile units (AMX) of x86-64; called by gram.py, which says what is computed.
//
// A float32 is taken as the sum of two bfloat16, high and low (16 bits of its mantissa), and a product as high high +
// high low + low high, summed in float32. Tiles are 16 columns by 32 tokens.
#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && (defined(__clang__) || __GNUC__ >= 11)
#define SPARSEC_AMX 1
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#define SPARSEC_AMX 0
#endif

// A mirror of `_Product` in gram.py. All matrices lie row by row.
struct Product {
  const float* x;   // (tokens, cols)
  const float* x0;  // (tokens, cols); may be x
  float* sums;      // strips of `strip` rows, one after the other, each from its diagonal on
  uint32_t* scratch;  // at a multiple of 64 bytes: 4 parts of kTokens / 2 * cols rounded up to kBlock
  int64_t tokens, cols, strip;
  int64_t fresh;    // 1: what stands in `sums` does not count
  int64_t threads;
};

#if SPARSEC_AMX

#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in GCC 12's own headers
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512bf16,amx-tile,amx-bf16")

namespace {

constexpr int64_t kTile = 16;               // columns of a tile
constexpr int64_t kDeep = 32;               // and tokens
constexpr int64_t kBlock = 2 * kTile;       // columns and rows of the result that are computed together
constexpr int64_t kTokens = 256;            // at a time: two tiles' columns of x, high and low, fill 32 KB
constexpr int64_t kWords = kTile * kTile;   // of a tile: pairs of bfloat16
constexpr int64_t kWide = 256;              // columns of x0 that stay in the second-level cache

struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, unused[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// A panel is 16 columns: tile after tile, high and low in turn, each with a row for two tokens.
inline uint32_t* panel(uint32_t* part, int64_t columns, int64_t tiles) {
  return part + columns / kTile * tiles * 2 * kWords;
}

inline __m512i widened(__m512 value) { return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(value)); }

inline __m512 rest(__m512 value, __m512i high) {
  return _mm512_sub_ps(value, _mm512_castsi512_ps(_mm512_slli_epi32(high, 16)));
}

// 16 columns of some tokens: pairs of tokens side by side, zeros after the last.
void split(const float* x, int64_t tokens, int64_t cols, int64_t column, int64_t tiles, uint32_t* to) {
  const int64_t wide = std::max<int64_t>(0, std::min(kTile, cols - column));
  const __mmask16 some = static_cast<__mmask16>((1u << wide) - 1);
  for (int64_t pair = 0; pair < tiles * kTile; ++pair) {
    const float* row = x + 2 * pair * cols + column;
    const __m512 even = _mm512_maskz_loadu_ps(2 * pair < tokens ? some : 0, row);
    const __m512 odd = _mm512_maskz_loadu_ps(2 * pair + 1 < tokens ? some : 0, row + cols);
    const __m512i high[2] = {widened(even), widened(odd)};
    const __m512i low[2] = {widened(rest(even, high[0])), widened(rest(odd, high[1]))};
    uint32_t* at = to + pair / kTile * 2 * kWords + pair % kTile * kTile;
    _mm512_store_si512(at, _mm512_or_si512(high[0], _mm512_slli_epi32(high[1], 16)));
    _mm512_store_si512(at + kWords, _mm512_or_si512(low[0], _mm512_slli_epi32(low[1], 16)));
  }
}

// A tile with a row for each column instead of each pair.
void turn(const uint32_t* from, uint32_t* to) {
  __m512i column = _mm512_mullo_epi32(
      _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_epi32(kTile));
  for (int64_t i = 0; i < kTile; ++i) _mm512_store_si512(to + i * kTile, _mm512_i32gather_epi32(column, from + i, 4));
}

// Adds the products of the tiles 4, 5 and 6, 7 to the tiles 0 to 3.
inline void add_products() {
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

// 32 x 32 of the result, in the tiles 0 to 3: high high, high low, low high.
inline void multiply(const uint32_t* x, const uint32_t* x0, int64_t tiles) {
  const int64_t next = tiles * 2 * kWords;  // the next 16 columns
  for (int64_t k = 0; k < tiles; ++k, x += 2 * kWords, x0 += 2 * kWords) {
    _tile_loadd(4, x, 64);
    _tile_loadd(5, x + next, 64);
    _tile_loadd(6, x0, 64);
    _tile_loadd(7, x0 + next, 64);
    add_products();
    _tile_loadd(6, x0 + kWords, 64);
    _tile_loadd(7, x0 + next + kWords, 64);
    add_products();
    _tile_loadd(4, x + kWords, 64);
    _tile_loadd(5, x + next + kWords, 64);
    _tile_loadd(6, x0, 64);
    _tile_loadd(7, x0 + next, 64);
    add_products();
  }
}

inline void load(const float* from, int64_t stride) {
  _tile_loadd(0, from, stride * 4);
  _tile_loadd(1, from + kTile, stride * 4);
  _tile_loadd(2, from + kTile * stride, stride * 4);
  _tile_loadd(3, from + kTile * stride + kTile, stride * 4);
}

inline void store(float* to, int64_t stride) {
  _tile_stored(0, to, stride * 4);
  _tile_stored(1, to + kTile, stride * 4);
  _tile_stored(2, to + kTile * stride, stride * 4);
  _tile_stored(3, to + kTile * stride + kTile, stride * 4);
}

// Adds to 32 x 32 of the result, of which `rows` x `cols` are there.
void add(float* sums, int64_t stride, int64_t rows, int64_t cols, bool fresh, const uint32_t* x, const uint32_t* x0,
         int64_t tiles) {
  alignas(64) float edge[kBlock * kBlock];
  const bool whole = rows >= kBlock && cols >= kBlock;
  if (fresh) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else if (whole) {
    load(sums, stride);
  } else {
    std::memset(edge, 0, sizeof edge);
    for (int64_t i = 0; i < std::min(rows, kBlock); ++i)
      std::memcpy(edge + i * kBlock, sums + i * stride, std::min(cols, kBlock) * 4);
    load(edge, kBlock);
  }
  multiply(x, x0, tiles);
  if (whole) return store(sums, stride);
  store(edge, kBlock);
  for (int64_t i = 0; i < std::min(rows, kBlock); ++i)
    std::memcpy(sums + i * stride, edge + i * kBlock, std::min(cols, kBlock) * 4);
}

bool supported() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false;  // AMX-BF16, -TILE
  if (!__builtin_cpu_supports("avx512bf16") || !__builtin_cpu_supports("avx512bw")) return false;
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM: Linux keeps the tiles' state from then on
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

}  // namespace

extern "C" int64_t sparsec_gram_supported() {
  static const bool found = supported();
  return found;
}

extern "C" void sparsec_gram(const Product* product) {
  const Product& p = *product;
  const int64_t blocks = (p.cols + kBlock - 1) / kBlock, padded = blocks * kBlock;
  uint32_t* const mixed = p.scratch;                        // of x0, as it was split
  uint32_t* const turned = mixed + kTokens * padded;        // of x, a row for each column
  const bool same = p.x == p.x0;
#pragma omp parallel num_threads(p.threads)
  {
    const TileConfig config;
    _tile_loadconfig(&config);
    for (int64_t first = 0; first < p.tokens; first += kTokens) {
      const int64_t count = std::min(kTokens, p.tokens - first), tiles = (count + kDeep - 1) / kDeep;
#pragma omp for schedule(static)
      for (int64_t column = 0; column < padded; column += kTile) {
        uint32_t *own = panel(mixed, column, tiles), *at = panel(turned, column, tiles);
        alignas(64) uint32_t other[2 * kTokens / kDeep * kWords];
        split(p.x0 + first * p.cols, count, p.cols, column, tiles, own);
        if (!same) split(p.x + first * p.cols, count, p.cols, column, tiles, other);
        for (int64_t k = 0; k < 2 * tiles; ++k) turn((same ? own : other) + k * kWords, at + k * kWords);
      }
      for (int64_t wide = 0; wide < padded; wide += kWide) {
        const int64_t end = std::min(wide + kWide, padded);
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t row = 0; row < padded; row += kBlock) {
          const int64_t begin = row / p.strip * p.strip;  // of the strip, in which columns begin there too
          const int64_t width = p.cols - begin, before = begin * p.cols - begin * (begin - p.strip) / 2;
          for (int64_t column = std::max(wide, begin / kBlock * kBlock); column < end; column += kBlock)
            add(p.sums + before + (row - begin) * width + column - begin, width, p.cols - row, p.cols - column,
                p.fresh && !first, panel(turned, row, tiles), panel(mixed, column, tiles), tiles);
        }
      }
#pragma omp barrier
    }
    _tile_release();
  }
}

#pragma GCC pop_options

#else

extern "C" int64_t sparsec_gram_supported() { return 0; }
extern "C" void sparsec_gram(const Product*) {}

#endif
