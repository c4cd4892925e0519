// In place of the compiler's <immintrin.h>: AVX-512 and VNNI done by SIMDe in plain C++ and AVX2, so that the very lines
// of the kernels are tested on processors without these instructions. SSE to AVX2 stay the compiler's own.
//
// An intrinsic that neither SIMDe nor the end of this file has is a compile error: the compiler's own needs a target
// that build.py took away. Add it below, from Intel's description of it.
#pragma once
#include_next <immintrin.h>

#define SIMDE_ENABLE_NATIVE_ALIASES
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <simde/x86/avx512.h>
#pragma GCC diagnostic pop

#include <cstdint>
#include <cstring>

namespace {
namespace emulation {

template <class Lane, class Vector>
struct Lanes {
  static constexpr int kCount = sizeof(Vector) / sizeof(Lane);
  Lane lane[kCount];
  explicit Lanes(const Vector& vector) { std::memcpy(lane, &vector, sizeof(vector)); }
  Vector vector() const {
    Vector result;
    std::memcpy(&result, lane, sizeof(result));
    return result;
  }
};

// Lanes without a mask bit keep what `otherwise` holds; their memory is not touched, as on the processor.
template <class Lane, class Vector>
Vector load(const Vector& otherwise, uint64_t mask, const void* from) {
  Lanes<Lane, Vector> result(otherwise);
  for (int i = 0; i < result.kCount; ++i)
    if (mask >> i & 1) std::memcpy(&result.lane[i], static_cast<const Lane*>(from) + i, sizeof(Lane));
  return result.vector();
}

template <class Lane, class Vector>
void store(void* to, uint64_t mask, const Vector& vector) {
  const Lanes<Lane, Vector> lanes(vector);
  for (int i = 0; i < lanes.kCount; ++i)
    if (mask >> i & 1) std::memcpy(static_cast<Lane*>(to) + i, &lanes.lane[i], sizeof(Lane));
}

template <class Lane, class Vector, class Index>
Vector gather(const Index& index, const void* base, int scale) {
  const Lanes<int32_t, Index> which(index);
  Lanes<Lane, Vector> result{Vector()};
  for (int i = 0; i < result.kCount; ++i)
    std::memcpy(&result.lane[i], static_cast<const char*>(base) + int64_t(which.lane[i]) * scale, sizeof(Lane));
  return result.vector();
}

template <class To, class From, class Result, class Vector>
Result convert(const Vector& vector) {
  const Lanes<From, Vector> lanes(vector);
  Lanes<To, Result> result{Result()};
  for (int i = 0; i < result.kCount; ++i) result.lane[i] = To(lanes.lane[i]);
  return result.vector();
}

// Two quarters of each of two vectors.
template <class Vector>
Vector quarters(const Vector& low, const Vector& high, int which) {
  Vector result;
  for (int i = 0; i < 4; ++i)
    std::memcpy(reinterpret_cast<char*>(&result) + i * sizeof(Vector) / 4,
                reinterpret_cast<const char*>(i < 2 ? &low : &high) + (which >> 2 * i & 3) * sizeof(Vector) / 4,
                sizeof(Vector) / 4);
  return result;
}

}  // namespace emulation
}  // namespace

// What SIMDe 0.7.4 lacks.
#define _mm512_maskz_loadu_ps(mask, from) emulation::load<float>(__m512(), mask, from)
#define _mm512_mask_storeu_ps(to, mask, vector) emulation::store<float>(to, mask, vector)
#define _mm512_maskz_loadu_epi32(mask, from) emulation::load<int32_t>(__m512i(), mask, from)
#define _mm512_mask_storeu_epi32(to, mask, vector) emulation::store<int32_t>(to, mask, vector)
#define _mm512_i32gather_ps(index, base, scale) emulation::gather<float, __m512>(index, base, scale)
#define _mm512_cvtepu8_epi32(vector) emulation::convert<int32_t, uint8_t, __m512i>(vector)
#define _mm512_shuffle_f32x4(low, high, which) emulation::quarters<__m512>(low, high, which)

// AVX2 has these, but AddressSanitizer sees only what is written as C++.
#define EMULATED_SIGNS(mask) uint64_t(_mm256_movemask_ps(_mm256_castsi256_ps(mask)))
#define _mm256_maskload_ps(from, mask) emulation::load<float>(__m256(), EMULATED_SIGNS(mask), from)
#define _mm256_maskstore_ps(to, mask, vector) emulation::store<float>(to, EMULATED_SIGNS(mask), vector)
#define _mm256_maskload_epi32(from, mask) emulation::load<int32_t>(__m256i(), EMULATED_SIGNS(mask), from)
#define _mm256_maskstore_epi32(to, mask, vector) emulation::store<int32_t>(to, EMULATED_SIGNS(mask), vector)
#undef _mm256_i32gather_ps
#define _mm256_i32gather_ps(base, index, scale) emulation::gather<float, __m256>(index, base, scale)
