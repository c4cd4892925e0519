// AVX-512: a step is one vpermps (pick 16 of the chunk's activations) and one fused multiply-add a token.
#include "kernels.h"

#if !defined(__x86_64__)
const Kernels* avx512_kernels() { return nullptr; }
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
// g++ 12 warns of its own _mm512_undefined_* wherever an intrinsic is inlined.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>

#include "token_kernel.h"

namespace {

struct Avx512 : Lanes<16> {
  SPARSEC_INLINE static Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
  SPARSEC_INLINE static void transpose(Float (&r)[16]) {
    __m512 pairs[16], quads[16];
    each<8>([&](auto i) SPARSEC_INLINE {
      pairs[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
      pairs[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    });
    each<4>([&](auto i) SPARSEC_INLINE {
      each<2>([&](auto half) SPARSEC_INLINE {
        const __m512 a = pairs[4 * i + half], b = pairs[4 * i + 2 + half];
        quads[4 * i + 2 * half] = _mm512_shuffle_ps(a, b, 0x44);
        quads[4 * i + 2 * half + 1] = _mm512_shuffle_ps(a, b, 0xee);
      });
    });
    // quads[4 * i + c] holds, in its four lanes, rows 4i..4i+3 of columns c, c + 4, c + 8, c + 12.
    each<4>([&](auto c) SPARSEC_INLINE {
      const __m512 a = _mm512_shuffle_f32x4(quads[c], quads[4 + c], 0x88);
      const __m512 b = _mm512_shuffle_f32x4(quads[8 + c], quads[12 + c], 0x88);
      const __m512 d = _mm512_shuffle_f32x4(quads[c], quads[4 + c], 0xdd);
      const __m512 e = _mm512_shuffle_f32x4(quads[8 + c], quads[12 + c], 0xdd);
      r[c] = _mm512_shuffle_f32x4(a, b, 0x88);
      r[8 + c] = _mm512_shuffle_f32x4(a, b, 0xdd);
      r[4 + c] = _mm512_shuffle_f32x4(d, e, 0x88);
      r[12 + c] = _mm512_shuffle_f32x4(d, e, 0xdd);
    });
  }
};

constexpr int kPrefetch = 1024;  // floats ahead of the weights in use: 1 to 7 % faster than without, 20 % from memory

__mmask16 lanes(int64_t count) { return __mmask16(count >= 16 ? 0xffff : count <= 0 ? 0 : (1 << count) - 1); }

template <int TOKENS, int VECTORS, bool BF16>
void tile_of(const TileCall& call) {
  constexpr int kAccumulators = TOKENS * VECTORS;
  __m512 acc[kAccumulators];
  each<kAccumulators>([&](auto i) SPARSEC_INLINE {
    constexpr int token = i / VECTORS, vector = i % VECTORS;
    const __mmask16 mask = lanes(call.rows - 16 * vector);
    acc[i] = _mm512_setzero_ps();
    if (call.first && call.bias) acc[i] = _mm512_maskz_loadu_ps(mask, call.bias + 16 * vector);
    if (!call.first && token < call.tokens)
      acc[i] = _mm512_maskz_loadu_ps(mask, call.y + token * call.y_stride + 16 * vector);
  });

  const float* panel = call.panel;
  const uint8_t* index = call.index;
  const float* values = call.values;
  const int64_t stride = call.tile_vectors * 16;
  __m512i which[VECTORS];
  auto step = [&](auto is_odd) SPARSEC_INLINE {
    // Words are read again for their odd halves: registers to keep them are not free.
    if (BF16 && is_odd()) asm("" : "+r"(values));
    __m512 weight[VECTORS];
    each<VECTORS>([&](auto v) SPARSEC_INLINE {
      const __m512i word = _mm512_loadu_si512(values + 16 * v);
      weight[v] = _mm512_castsi512_ps(!BF16      ? word
                                      : is_odd() ? _mm512_and_si512(word, _mm512_set1_epi32(int(0xffff0000)))
                                                 : _mm512_slli_epi32(word, 16));
    });
    each<VECTORS>([&](auto v) SPARSEC_INLINE {
      _mm_prefetch(reinterpret_cast<const char*>(values + 16 * v + kPrefetch), _MM_HINT_T0);
    });
    if (!BF16 || is_odd()) values += stride;
    // Keeps the compiler from holding all activations of a chunk in registers across steps, which would spill.
    if (TOKENS > 4) asm("" : "+r"(panel));
    each<TOKENS>([&](auto t) SPARSEC_INLINE {
      const __m512 x = _mm512_load_ps(panel + 16 * t);
      each<VECTORS>([&](auto v) SPARSEC_INLINE {
        acc[t * VECTORS + v] = _mm512_fmadd_ps(weight[v], _mm512_permutexvar_ps(which[v], x), acc[t * VECTORS + v]);
      });
    });
  };
  for (int64_t chunk = 0; chunk < call.chunks; ++chunk) {
    const int steps = chunk + 1 < call.chunks ? call.steps : call.last_steps;
    for (int left = steps; left > 0; left -= 2) {
      each<VECTORS>([&](auto v) SPARSEC_INLINE {
        which[v] = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(index + 16 * v)));
      });
      index += stride;
      step(std::false_type{});
      if (left == 1) break;
      each<VECTORS>([&](auto v) SPARSEC_INLINE { which[v] = _mm512_srli_epi32(which[v], 4); });
      step(std::true_type{});
    }
    if (BF16 && steps % 2) values += stride;
    panel += 16 * TOKENS;
  }

  each<kAccumulators>([&](auto i) SPARSEC_INLINE {
    constexpr int token = i / VECTORS, vector = i % VECTORS;
    if (token < call.tokens)
      _mm512_mask_storeu_ps(call.y + token * call.y_stride + 16 * vector, lanes(call.rows - 16 * vector), acc[i]);
  });
}

template <int TOKENS, int VECTORS>
void tile(const TileCall& call) {
  call.bf16 ? tile_of<TOKENS, VECTORS, true>(call) : tile_of<TOKENS, VECTORS, false>(call);
}

void fill(const FillCall& call) {
  const int groups = 16 / call.slot, width = groups * call.m;
  alignas(64) int order[16];  // which of the chunk's columns a slot takes; slots without a column take any
  for (int i = 0; i < 16; ++i) order[i] = (i / call.slot * call.m + i % call.slot) & 15;
  const __m512i permutation = _mm512_load_si512(order);
  for (int64_t chunk = 0; chunk < call.chunks; ++chunk) {
    const int64_t column = (call.first_chunk + chunk) * width, left = call.cols - column;
    const __mmask16 real = lanes(left < width ? left : width);
    float* to = call.panel + chunk * call.block * 16;
    const float* x = call.x + column;
    for (int t = 0; t < call.tokens; ++t, x += call.cols)
      _mm512_store_ps(to + 16 * t, _mm512_permutexvar_ps(permutation, _mm512_maskz_loadu_ps(real, x)));
    for (int t = call.tokens; t < call.block; ++t) _mm512_store_ps(to + 16 * t, _mm512_setzero_ps());
  }
}

void gather(const GatherCall& call) {
  for (int64_t chunk = 0; chunk < call.chunks; ++chunk) {
    const __m512i columns = _mm512_loadu_si512(call.columns + chunk * 16);
    float* to = call.panel + chunk * call.block * 16;
    const float* x = call.x;
    for (int t = 0; t < call.tokens; ++t, x += call.cols) _mm512_storeu_ps(to + 16 * t, _mm512_i32gather_ps(columns, x, 4));
    for (int t = call.tokens; t < call.block; ++t) _mm512_storeu_ps(to + 16 * t, _mm512_setzero_ps());
  }
}

// Blocks are as large as 32 registers allow: accumulators + 2 registers a row vector + 2 temporaries.
constexpr Kernels kernels = {
    80,
    {1, 2, 4, 6, 8, 10, 12, 0},
    {{tile<1, 1>, tile<1, 2>, tile<1, 4>},
     {tile<2, 1>, tile<2, 2>, tile<2, 4>},
     {tile<4, 1>, tile<4, 2>, tile<4, 4>},
     {tile<6, 1>, tile<6, 2>, nullptr},
     {tile<8, 1>, tile<8, 2>, nullptr},
     {tile<10, 1>, tile<10, 2>, nullptr},
     {tile<12, 1>, tile<12, 2>, nullptr}},
    fill,
    gather,
    token_kernels<Avx512>(),
    activate<Avx512>,
};

}  // namespace

const Kernels* avx512_kernels() { return &kernels; }
#endif
