// Vectors of floats of any width, and the activation functions on them: the code that all levels share.
// Each level's file includes this after naming its instructions, so that the compiler emits them.
#pragma once
#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "unroll.h"

namespace {  // one copy a file: each file is compiled for another instruction set

template <int WIDTH>
struct Lanes {
  // NOLINT: the attribute needs the old spelling.
  typedef float Float __attribute__((vector_size(4 * WIDTH)));
  typedef int32_t Int __attribute__((vector_size(4 * WIDTH)));
};

template <class V>
SPARSEC_INLINE inline V load(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof(V));
  return v;
}

template <class V>
SPARSEC_INLINE inline void store(void* to, const V& v) {
  std::memcpy(to, &v, sizeof(V));
}

template <class V>
SPARSEC_INLINE inline V splat(float value) {
  return value - V{};
}

// exp(x) to 2 units in the last place for |x| <= 87; 0 below and Inf above, NaN where x is NaN. The polynomial is
// Cephes' expf: exp(r) on |r| <= ln 2 / 2.
template <class L>
SPARSEC_INLINE inline typename L::Float exponential(typename L::Float x) {
  using V = typename L::Float;
  using I = typename L::Int;
  x = splat<V>(89.0f) < x ? splat<V>(89.0f) : x;  // in this order a NaN stays
  x = splat<V>(-88.0f) > x ? splat<V>(-88.0f) : x;
  const V magic = splat<V>(12582912.0f);  // 1.5 * 2^23: the sum's low bits are the rounded integer
  const V shifted = x * splat<V>(1.44269504f) + magic, n = shifted - magic;
  const V r = (x - n * splat<V>(0.693359375f)) + n * splat<V>(2.12194440e-4f);
  V p = splat<V>(1.9875691500e-4f);
  p = p * r + splat<V>(1.3981999507e-3f);
  p = p * r + splat<V>(8.3334519073e-3f);
  p = p * r + splat<V>(4.1665795894e-2f);
  p = p * r + splat<V>(1.6666665459e-1f);
  p = p * r + splat<V>(5.0000001201e-1f);
  p = p * r * r + r + splat<V>(1.0f);
  const I power = (((I)shifted - (I)magic) + 127) << 23;  // 128 + 127 gives Inf, -127 + 127 gives 0
  return p * (V)power;
}

// erf(x), error below 2e-7: an odd rational function on |x| < 4 (Eigen's), +-1 beyond.
template <class L>
SPARSEC_INLINE inline typename L::Float error_function(typename L::Float x) {
  using V = typename L::Float;
  const V s = x * x;
  V p = splat<V>(-2.72614225801306e-10f);
  p = p * s + splat<V>(2.77068142495902e-08f);
  p = p * s + splat<V>(-2.10102402082508e-06f);
  p = p * s + splat<V>(-5.69250639462346e-05f);
  p = p * s + splat<V>(-7.34990630326855e-04f);
  p = p * s + splat<V>(-2.95459980854025e-03f);
  p = p * s + splat<V>(-1.60960333262415e-02f);
  V q = splat<V>(-1.45660718464996e-05f);
  q = q * s + splat<V>(-2.13374055278905e-04f);
  q = q * s + splat<V>(-1.68282697438203e-03f);
  q = q * s + splat<V>(-7.37332916720468e-03f);
  q = q * s + splat<V>(-1.42647390514189e-02f);
  const V inside = x * p / q;
  return x >= splat<V>(4.0f) ? splat<V>(1.0f) : x <= splat<V>(-4.0f) ? splat<V>(-1.0f) : inside;
}

template <class L>
SPARSEC_INLINE inline typename L::Float activated(Activation activation, typename L::Float x) {
  using V = typename L::Float;
  const V one = splat<V>(1.0f);
  switch (activation) {
    case kRelu:
      return splat<V>(0.0f) > x ? splat<V>(0.0f) : x;
    case kGelu:
      return splat<V>(0.5f) * x * (one + error_function<L>(x * splat<V>(0.70710678f)));
    case kGeluTanh:  // (1 + tanh u) / 2 = 1 / (1 + exp(-2u)), u = sqrt(2 / pi) (x + 0.044715 x^3)
      return x / (one + exponential<L>(x * (x * x * splat<V>(-0.0713548163f) - splat<V>(1.5957691216f))));
    case kSilu:
      return x / (one + exponential<L>(-x));
    case kNone:
      break;
  }
  return x;
}

template <class L>
void activate(Activation activation, float* y, int64_t count) {
  using V = typename L::Float;
  constexpr int kWidth = sizeof(V) / sizeof(float);
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store(y + i, activated<L>(activation, load<V>(y + i)));
  if (i == count) return;
  V rest = {};
  std::memcpy(&rest, y + i, size_t(count - i) * sizeof(float));
  rest = activated<L>(activation, rest);
  std::memcpy(y + i, &rest, size_t(count - i) * sizeof(float));
}

}  // namespace
