// int8 on AVX2, which has no product of bytes that cannot saturate: the sign of a weight goes to the activation, so that
// vpmaddubsw adds two products of at most 127 * 127 and stays in 16 bits. A shuffle picks the 2 kept of the 4 columns of
// both groups of a pair: 5 instructions for 8 rows, a token and 8 columns.
#include "int8.h"

#if !defined(__x86_64__)
const int8::Kernels* int8::avx2_kernels() { return nullptr; }
#else
#pragma GCC target("avx2,fma")
#include <immintrin.h>

#include "int8_avx2.h"
#include "unroll.h"

namespace int8 {

namespace {

// Half a row vector: 8 rows.
template <int TOKENS>
void half_tile(const TileCall& call, int half) {
  __m256i acc[TOKENS];
  const __m256i mask = first_lanes(call.rows - 8 * half);
  each<TOKENS>([&](auto t) SPARSEC_INLINE {
    acc[t] = _mm256_setzero_si256();
    if (!call.first && t < call.tokens) acc[t] = _mm256_maskload_epi32(call.y + t * call.y_stride + 8 * half, mask);
  });
  const __m256i ones = _mm256_set1_epi16(1);
  const uint8_t* panel = call.panel;
  const uint8_t* picks = call.weights + 32 * half;
  const int8_t* values = call.values + 32 * half;
  for (int64_t pair = 0; pair < call.pairs; ++pair, panel += 8 * TOKENS, picks += 64, values += 64) {
    const __m256i pick = _mm256_load_si256(reinterpret_cast<const __m256i*>(picks));
    const __m256i weight = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
    const __m256i magnitude = _mm256_abs_epi8(weight);
    each<TOKENS>([&](auto t) SPARSEC_INLINE {
      int64_t eight;
      __builtin_memcpy(&eight, panel + 8 * t, 8);
      const __m256i x = _mm256_sign_epi8(_mm256_shuffle_epi8(_mm256_set1_epi64x(eight), pick), weight);
      acc[t] = _mm256_add_epi32(acc[t], _mm256_madd_epi16(_mm256_maddubs_epi16(magnitude, x), ones));
    });
  }
  each<TOKENS>([&](auto t) SPARSEC_INLINE {
    if (t < call.tokens) store_lanes(call.y + t * call.y_stride + 8 * half, call.rows - 8 * half, acc[t]);
  });
}

template <int TOKENS>
void tile(const TileCall& call) {
  half_tile<TOKENS>(call, 0);
  half_tile<TOKENS>(call, 1);
}

// 64 bytes a pair: for each row, where in the 8 bytes of a token its 4 kept ones lie.
void expand(const ExpandCall& call) {
  alignas(32) int32_t even[8] = {}, odd[8] = {};
  for (int code = 0; code < kCodes; ++code) {
    even[code] = kKept[code][0] | kKept[code][1] << 8;
    odd[code] = (4 + kKept[code][0]) << 16 | (4 + kKept[code][1]) << 24;
  }
  const __m256i even_picks = _mm256_load_si256(reinterpret_cast<const __m256i*>(even));
  const __m256i odd_picks = _mm256_load_si256(reinterpret_cast<const __m256i*>(odd));
  for (int64_t i = 0; i < call.pairs * 2; ++i) {
    const __m256i codes =
        _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(call.codes + 8 * i)));
    const __m256i first = _mm256_permutevar8x32_epi32(even_picks, codes);  // reads the low 3 bits only
    const __m256i second = _mm256_permutevar8x32_epi32(odd_picks, _mm256_srli_epi32(codes, 4));
    _mm256_store_si256(reinterpret_cast<__m256i*>(call.to + 32 * i), _mm256_or_si256(first, second));
  }
}

constexpr Kernels kernels = {
    20, {1, 2, 4, 8, 0}, {tile<1>, tile<2>, tile<4>, tile<8>}, quantise_avx2, fill_panel<false>, expand, finish_avx2};

}  // namespace

const Kernels* avx2_kernels() { return &kernels; }

}  // namespace int8
#endif
