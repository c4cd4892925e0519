// AVX2 + FMA: a row vector is two halves of 8 lanes. A group that fits 8 slots needs one vpermps a half and token;
// M = 9..16 needs two and a blend.
#include "kernels.h"

#if !defined(__x86_64__)
const Kernels* avx2_kernels() { return nullptr; }
#else
#pragma GCC target("avx2,fma")
#include <immintrin.h>

#include "token_kernel.h"

namespace {

struct Avx2 : Lanes<8> {
  SPARSEC_INLINE static Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
  SPARSEC_INLINE static void transpose(Float (&r)[8]) {
    __m256 pairs[8], quads[8];
    each<4>([&](auto i) SPARSEC_INLINE {
      pairs[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
      pairs[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    });
    each<2>([&](auto i) SPARSEC_INLINE {
      each<2>([&](auto half) SPARSEC_INLINE {
        const __m256 a = pairs[4 * i + half], b = pairs[4 * i + 2 + half];
        quads[4 * i + 2 * half] = _mm256_shuffle_ps(a, b, 0x44);
        quads[4 * i + 2 * half + 1] = _mm256_shuffle_ps(a, b, 0xee);
      });
    });
    each<4>([&](auto i) SPARSEC_INLINE {
      r[i] = _mm256_permute2f128_ps(quads[i], quads[4 + i], 0x20);
      r[4 + i] = _mm256_permute2f128_ps(quads[i], quads[4 + i], 0x31);
    });
  }
};

__m256i lanes(int64_t count) {
  const int n = count >= 8 ? 8 : count <= 0 ? 0 : int(count);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

// WHOLE_CHUNK: a group may span both halves of the chunk (M = 9..16).
template <int TOKENS, int HALVES, bool WHOLE_CHUNK, bool BF16>
void halves(const TileCall& call) {
  constexpr int kAccumulators = TOKENS * HALVES;
  __m256 acc[kAccumulators];
  each<kAccumulators>([&](auto i) SPARSEC_INLINE {
    constexpr int token = i / HALVES, half = i % HALVES;
    const __m256i mask = lanes(call.rows - 8 * half);
    acc[i] = _mm256_setzero_ps();
    if (call.first && call.bias) acc[i] = _mm256_maskload_ps(call.bias + 8 * half, mask);
    if (!call.first && token < call.tokens)
      acc[i] = _mm256_maskload_ps(call.y + token * call.y_stride + 8 * half, mask);
  });

  const float* panel = call.panel;
  const uint8_t* index = call.index;
  const float* values = call.values;
  const int64_t stride = call.tile_vectors * 16;
  auto multiply = [&](auto h, __m256i which, __m256i word, const float* x) SPARSEC_INLINE {
    // A permutation reads the low 3 bits of an index and a blend its sign: bit 3, which names the half of the chunk.
    if (WHOLE_CHUNK) which = _mm256_or_si256(which, _mm256_slli_epi32(which, 28));
    asm("" : "+r"(x));  // keeps the compiler from holding activations in registers across halves, which would spill
    each<TOKENS>([&](auto t) SPARSEC_INLINE {
      __m256 picked = _mm256_permutevar8x32_ps(_mm256_load_ps(x + 16 * t), which);
      if (WHOLE_CHUNK) {
        const __m256 high = _mm256_permutevar8x32_ps(_mm256_load_ps(x + 16 * t + 8), which);
        picked = _mm256_blendv_ps(picked, high, _mm256_castsi256_ps(which));
      }
      acc[t * HALVES + h] = _mm256_fmadd_ps(_mm256_castsi256_ps(word), picked, acc[t * HALVES + h]);
    });
  };
  // Two steps of one half after the other: only the sums and a few temporaries are in registers.
  auto pair = [&](const int* half, auto has_odd) SPARSEC_INLINE {
    each<HALVES>([&](auto h) SPARSEC_INLINE {
      const __m256i which = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(index + 8 * h)));
      const __m256i word = load<__m256i>(values + 8 * h);
      multiply(h, which, BF16 ? _mm256_slli_epi32(word, 16) : word, panel + half[0]);
      if (!has_odd()) return;
      // A mask for the high half would take a register.
      const __m256i odd = BF16 ? _mm256_slli_epi32(_mm256_srli_epi32(word, 16), 16) : load<__m256i>(values + stride + 8 * h);
      multiply(h, _mm256_srli_epi32(which, 4), odd, panel + half[1]);
    });
    index += stride;
    values += BF16 || !has_odd() ? stride : 2 * stride;
  };
  for (int64_t chunk = 0; chunk < call.chunks; ++chunk) {
    const int steps = chunk + 1 < call.chunks ? call.steps : call.last_steps;
    int s = 0;
    for (; s + 1 < steps; s += 2) pair(call.half + s, std::true_type{});
    if (s < steps) pair(call.half + s, std::false_type{});
    panel += 16 * TOKENS;
  }

  each<kAccumulators>([&](auto i) SPARSEC_INLINE {
    constexpr int token = i / HALVES, half = i % HALVES;
    if (token < call.tokens)
      _mm256_maskstore_ps(call.y + token * call.y_stride + 8 * half, lanes(call.rows - 8 * half), acc[i]);
  });
}

template <int TOKENS, int VECTORS, bool BF16>
void tile_of(const TileCall& call) {
  call.slot < 16 ? halves<TOKENS, 2 * VECTORS, false, BF16>(call) : halves<TOKENS, 2 * VECTORS, true, BF16>(call);
}

template <int TOKENS, int VECTORS>
void tile(const TileCall& call) {
  call.bf16 ? tile_of<TOKENS, VECTORS, true>(call) : tile_of<TOKENS, VECTORS, false>(call);
}

void fill(const FillCall& call) {
  // Each half of the panel vector comes from 8 consecutive columns, moved to their slots by one permutation.
  const int groups = 16 / call.slot, width = groups * call.m;
  const int half_width = call.slot == 16 ? 8 : width / 2;
  alignas(32) int order[8];
  for (int i = 0; i < 8; ++i) {
    const int column = call.slot == 16 ? i : i / call.slot * call.m + i % call.slot;
    order[i] = column < 8 ? column : 0;
  }
  const __m256i permutation = _mm256_load_si256(reinterpret_cast<const __m256i*>(order));
  for (int64_t chunk = 0; chunk < call.chunks; ++chunk) {
    const int64_t column = (call.first_chunk + chunk) * width, left = call.cols - column;
    const __m256i low = lanes(left), high = lanes(left - half_width);
    float* to = call.panel + chunk * call.block * 16;
    for (int t = 0; t < call.block; ++t) {
      __m256 a = _mm256_setzero_ps(), b = a;
      if (t < call.tokens) {
        const float* x = call.x + t * call.cols + column;
        a = _mm256_maskload_ps(x, low);
        b = _mm256_maskload_ps(x + half_width, high);
      }
      _mm256_store_ps(to + 16 * t, _mm256_permutevar8x32_ps(a, permutation));
      _mm256_store_ps(to + 16 * t + 8, _mm256_permutevar8x32_ps(b, permutation));
    }
  }
}

void gather(const GatherCall& call) {
  for (int64_t chunk = 0; chunk < call.chunks; ++chunk) {
    const __m256i low = load<__m256i>(call.columns + chunk * 16), high = load<__m256i>(call.columns + chunk * 16 + 8);
    float* to = call.panel + chunk * call.block * 16;
    for (int t = 0; t < call.block; ++t) {
      __m256 a = _mm256_setzero_ps(), b = a;
      if (t < call.tokens) {
        a = _mm256_i32gather_ps(call.x + t * call.cols, low, 4);
        b = _mm256_i32gather_ps(call.x + t * call.cols, high, 4);
      }
      _mm256_storeu_ps(to + 16 * t, a);
      _mm256_storeu_ps(to + 16 * t + 8, b);
    }
  }
}

constexpr Kernels kernels = {
    40,
    {1, 2, 4, 0},
    {{tile<1, 1>, tile<1, 2>, tile<1, 4>}, {tile<2, 1>, tile<2, 2>, nullptr}, {tile<4, 1>, nullptr, nullptr}},
    fill,
    gather,
    token_kernels<Avx2>(),
    activate<Avx2>,
};

}  // namespace

const Kernels* avx2_kernels() { return &kernels; }
#endif
