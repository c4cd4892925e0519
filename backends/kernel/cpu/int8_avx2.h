// What the AVX2 and the VNNI level do alike: quantise activations, gather the columns of a strip, scale the sums.
// Included after the target of the file is named.
#pragma once
#include <immintrin.h>

#include "int8.h"

namespace int8 {

namespace {  // one copy a file: each file is compiled for another instruction set

inline __m256i first_lanes(int64_t count) {
  const int n = count >= 8 ? 8 : count <= 0 ? 0 : int(count);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

// A masked store takes Zen processors ten times as long as a plain one, so it is for the last rows only.
inline void store_lanes(void* to, int64_t count, __m256i lanes) {
  if (count >= 8) return _mm256_storeu_si256(static_cast<__m256i*>(to), lanes);
  _mm256_maskstore_epi32(static_cast<int*>(to), first_lanes(count), lanes);
}

void quantise_avx2(const QuantiseCall& call) {
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  __m256i largest = _mm256_setzero_si256();  // magnitudes order like their bits, NaN above Inf above all numbers
  int64_t i = 0;
  for (; i + 8 <= call.cols; i += 8) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(call.x + i));
    largest = _mm256_max_epi32(largest, _mm256_and_si256(bits, magnitude));
  }
  const __m256i rest = first_lanes(call.cols - i);
  const __m256 tail = _mm256_maskload_ps(call.x + i, rest);
  largest = _mm256_max_epi32(largest, _mm256_and_si256(_mm256_castps_si256(tail), magnitude));
  alignas(32) int32_t lanes[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), largest);
  int32_t most = 0;
  for (int32_t lane : lanes) most = lane > most ? lane : most;
  const Scale scale = scale_of(most);
  *call.scale = scale.scale;
  if (scale.factor == 0.0f) return void(__builtin_memset(call.to, 0, size_t(call.cols)));
  const __m256 factor = _mm256_set1_ps(scale.factor);
  // 8 floats to the low 8 bytes; -127..127, so nothing saturates.
  auto bytes = [&](__m256 x) {
    const __m256i q = _mm256_cvtps_epi32(_mm256_mul_ps(x, factor));
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
    return _mm_packs_epi16(words, words);
  };
  // Rows have room for 16 bytes behind the last column, so the last vector is stored whole.
  for (i = 0; i + 8 <= call.cols; i += 8)
    _mm_storel_epi64(reinterpret_cast<__m128i*>(call.to + i), bytes(_mm256_loadu_ps(call.x + i)));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(call.to + i), bytes(tail));
}

// The 4 columns of both groups of every pair, each byte changed by `flip`.
void fill_panel(const FillCall& call, __m128i flip) {
  const Geometry& g = *call.geometry;
  for (int64_t pair = 0; pair < call.pairs; ++pair) {
    const int64_t group = (call.first_pair + pair) * 2;
    const bool has_second = group + 1 < g.groups;
    const uint8_t* columns = call.columns + group * 4;
    const int8_t* x = call.x + group * g.shape.m;
    uint8_t* to = call.panel + pair * call.block * 8;
    if (g.shape.m > 16) {
      for (int t = 0; t < call.tokens; ++t, x += call.x_stride) {
        alignas(16) int8_t eight[16] = {};
        for (int i = 0; i < 4; ++i) {
          eight[i] = x[columns[i]];
          eight[4 + i] = has_second ? x[g.shape.m + columns[4 + i]] : int8_t(0);
        }
        const __m128i bytes = _mm_load_si128(reinterpret_cast<const __m128i*>(eight));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(to + 8 * t), _mm_xor_si128(bytes, flip));
      }
      continue;
    }
    // M <= 8: 16 bytes from the first group on hold both groups. Otherwise each group has its own 16 bytes.
    const int64_t second = g.shape.m <= 8 || !has_second ? 0 : g.shape.m;
    alignas(16) uint8_t low[16], high[16];
    for (int i = 0; i < 16; ++i) low[i] = high[i] = 0x80;  // gives 0
    for (int i = 0; i < 4; ++i) {
      low[i] = columns[i];
      if (has_second) (second ? high : low)[4 + i] = uint8_t(columns[4 + i] + (second ? 0 : g.shape.m));
    }
    const __m128i pick_low = _mm_load_si128(reinterpret_cast<const __m128i*>(low));
    const __m128i pick_high = _mm_load_si128(reinterpret_cast<const __m128i*>(high));
    for (int t = 0; t < call.tokens; ++t, x += call.x_stride) {
      __m128i bytes = _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)), pick_low);
      if (second) {
        const __m128i more = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x + second));
        bytes = _mm_or_si128(bytes, _mm_shuffle_epi8(more, pick_high));
      }
      _mm_storel_epi64(reinterpret_cast<__m128i*>(to + 8 * t), _mm_xor_si128(bytes, flip));
    }
  }
}

void finish_avx2(const FinishCall& call) {
  const __m256 token_scale = _mm256_set1_ps(call.token_scale);
  float* y = static_cast<float*>(call.y);
  for (int64_t row = 0; row < call.rows; row += 8) {
    const __m256i mask = first_lanes(call.rows - row);
    const __m256 sums = _mm256_cvtepi32_ps(_mm256_maskload_epi32(static_cast<int32_t*>(call.y) + row, mask));
    const __m256 scales = _mm256_maskload_ps(call.scales + row, mask);
    __m256 scaled = _mm256_mul_ps(_mm256_mul_ps(sums, token_scale), scales);
    asm("" : "+x"(scaled));  // keeps the compiler from fusing the product and the sum, which would round once
    if (call.bias) scaled = _mm256_add_ps(scaled, _mm256_maskload_ps(call.bias + row, mask));
    store_lanes(y + row, call.rows - row, _mm256_castps_si256(scaled));
  }
}

}  // namespace

}  // namespace int8
