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

// The 4 columns of both groups of every pair; FLIP stores x + 128.
template <bool FLIP, bool TWO_LOADS>
void fill_shuffled(const FillCall& call) {
  const Geometry& g = *call.geometry;
  const __m128i flip = _mm_set1_epi8(char(0x80));
  const __m128i not_first = _mm_set_epi32(-1, -1, -1, 0), not_second = _mm_set_epi32(-1, -1, 0, -1);
  const __m128i zero = _mm_set1_epi8(char(0x80));  // picks nothing, which gives 0
  const __m128i shift = _mm_set_epi32(0, 0, int(g.shape.m) * 0x01010101, 0);
  for (int64_t pair = 0; pair < call.pairs; ++pair) {
    const int64_t group = (call.first_pair + pair) * 2;
    const bool alone = group + 1 == g.groups;
    // Both groups' columns: the table of a strip goes on behind its last group, if only with the next part.
    __m128i pick = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(call.columns + group * 4)), pick_second = zero;
    if (alone) pick = _mm_or_si128(pick, _mm_and_si128(not_first, zero));
    if (TWO_LOADS) {  // each group has its own 16 bytes
      pick_second = _mm_or_si128(pick, _mm_and_si128(not_second, zero));
      pick = _mm_or_si128(pick, _mm_and_si128(not_first, zero));
    } else if (!alone) {  // M <= 8: 16 bytes from the first group on hold both
      pick = _mm_add_epi8(pick, shift);
    }
    const int8_t* x = call.x + group * g.shape.m;
    const int64_t second = alone ? 0 : g.shape.m;
    uint8_t* to = call.panel + pair * call.block * 8;
    for (int t = 0; t < call.tokens; ++t, x += call.x_stride, to += 8) {
      __m128i bytes = _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)), pick);
      if (TWO_LOADS) {
        const __m128i more = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x + second));
        bytes = _mm_or_si128(bytes, _mm_shuffle_epi8(more, pick_second));
      }
      _mm_storel_epi64(reinterpret_cast<__m128i*>(to), FLIP ? _mm_xor_si128(bytes, flip) : bytes);
    }
  }
}

// The same byte by byte, for groups wider than a shuffle reaches.
void fill_bytes(const FillCall& call, uint8_t flip) {
  const Geometry& g = *call.geometry;
  for (int64_t pair = 0; pair < call.pairs; ++pair) {
    const int64_t group = (call.first_pair + pair) * 2;
    const uint8_t* columns = call.columns + group * 4;
    const int8_t* x = call.x + group * g.shape.m;
    uint8_t* to = call.panel + pair * call.block * 8;
    for (int t = 0; t < call.tokens; ++t, x += call.x_stride, to += 8)
      for (int i = 0; i < 4; ++i) {
        to[i] = uint8_t(x[columns[i]]) ^ flip;
        to[4 + i] = group + 1 < g.groups ? uint8_t(x[g.shape.m + columns[4 + i]]) ^ flip : flip;
      }
  }
}

template <bool FLIP>
void fill_panel(const FillCall& call) {
  const int64_t m = call.geometry->shape.m;
  if (m > 16) return fill_bytes(call, FLIP ? 0x80 : 0);
  return m > 8 ? fill_shuffled<FLIP, true>(call) : fill_shuffled<FLIP, false>(call);
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
