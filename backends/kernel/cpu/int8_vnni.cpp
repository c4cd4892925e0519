// int8 on AVX-512 VNNI: vpdpbusd adds 4 products of an unsigned and a signed byte to each of 16 rows. Activations are
// stored as x + 128; what that adds too much, 128 times the sum of a row's values, is where the sums start.
#include "int8.h"

#if !defined(__x86_64__)
const int8::Kernels* int8::vnni_kernels() { return nullptr; }
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma")
// g++ 12 warns of its own _mm512_undefined_* wherever an intrinsic is inlined.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>

#include "int8_avx2.h"
#include "unroll.h"

namespace int8 {

namespace {

template <int TOKENS>
void tile(const TileCall& call) {
  const __mmask16 mask = __mmask16((1 << call.rows) - 1);
  const __m512i start = _mm512_slli_epi32(_mm512_loadu_si512(call.sums), 7);
  __m512i acc[TOKENS];
  each<TOKENS>([&](auto t) SPARSEC_INLINE {
    acc[t] = _mm512_sub_epi32(_mm512_setzero_si512(), start);
    if (!call.first && t < call.tokens) acc[t] = _mm512_maskz_loadu_epi32(mask, call.y + t * call.y_stride);
  });
  const uint8_t* panel = call.panel;
  const uint8_t* weights = call.weights;
  for (int64_t pair = 0; pair < call.pairs; ++pair, panel += 8 * TOKENS, weights += kExpanded) {
    const __m512i even = _mm512_load_si512(weights), odd = _mm512_load_si512(weights + 64);
    each<TOKENS>([&](auto t) SPARSEC_INLINE {
      int32_t four[2];
      __builtin_memcpy(four, panel + 8 * t, 8);
      acc[t] = _mm512_dpbusd_epi32(acc[t], _mm512_set1_epi32(four[0]), even);
      acc[t] = _mm512_dpbusd_epi32(acc[t], _mm512_set1_epi32(four[1]), odd);
    });
  }
  each<TOKENS>([&](auto t) SPARSEC_INLINE {
    if (t < call.tokens) _mm512_mask_storeu_epi32(call.y + t * call.y_stride, mask, acc[t]);
  });
}

// 128 bytes a pair: the 4 columns of the even group for 16 rows, zeros where nothing is kept, then those of the odd one.
void expand(const ExpandCall& call) {
  alignas(64) int32_t places[16];  // by code: which of a row's bytes goes to each column; 0x80 gives 0
  for (int code = 0; code < 16; ++code) {
    uint8_t bytes[4] = {0x80, 0x80, 0x80, 0x80};
    if (code < kCodes)
      for (int k = 0; k < 2; ++k) bytes[kKept[code][k]] = uint8_t(k);
    __builtin_memcpy(&places[code], bytes, 4);
  }
  const __m512i even_places = _mm512_load_si512(places);
  const __m512i two = _mm512_set1_epi8(2), odd_places = _mm512_add_epi8(even_places, two);  // 0x82 gives 0 too
  const __m512i lane = _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0);  // first byte of a row in its 16
  for (int64_t pair = 0; pair < call.pairs; ++pair) {
    const __m512i values = _mm512_loadu_si512(call.values + 64 * pair);
    const __m512i codes =
        _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(call.codes + 16 * pair)));
    const __m512i even = _mm512_permutexvar_epi32(codes, even_places);  // reads the low 4 bits only
    const __m512i odd = _mm512_permutexvar_epi32(_mm512_srli_epi32(codes, 4), odd_places);
    _mm512_store_si512(call.to + kExpanded * pair, _mm512_shuffle_epi8(values, _mm512_add_epi8(even, lane)));
    _mm512_store_si512(call.to + kExpanded * pair + 64, _mm512_shuffle_epi8(values, _mm512_add_epi8(odd, lane)));
  }
}

constexpr Kernels kernels = {80,
                             {1, 2, 4, 8, 16, 0},
                             {tile<1>, tile<2>, tile<4>, tile<8>, tile<16>},
                             quantise_avx2,
                             fill_panel<true>,
                             expand,
                             finish_avx2};

}  // namespace

const Kernels* vnni_kernels() { return &kernels; }

}  // namespace int8
#endif
