// Plain C++ for any machine, on vectors of 4.
#include "kernels.h"
#include "token_kernel.h"

namespace {

struct Plain : Lanes<4> {
  SPARSEC_INLINE static Float fma(Float a, Float b, Float c) { return a * b + c; }
  SPARSEC_INLINE static void transpose(Float (&r)[4]) {
    const auto a = __builtin_shufflevector(r[0], r[1], 0, 4, 1, 5), b = __builtin_shufflevector(r[2], r[3], 0, 4, 1, 5);
    const auto c = __builtin_shufflevector(r[0], r[1], 2, 6, 3, 7), d = __builtin_shufflevector(r[2], r[3], 2, 6, 3, 7);
    r[0] = __builtin_shufflevector(a, b, 0, 1, 4, 5);
    r[1] = __builtin_shufflevector(a, b, 2, 3, 6, 7);
    r[2] = __builtin_shufflevector(c, d, 0, 1, 4, 5);
    r[3] = __builtin_shufflevector(c, d, 2, 3, 6, 7);
  }
};

// The row kernel is the faster one for one token only: without a permutation it looks up one activation a lane.
void tile(const TileCall& call) {
  float acc[kLanes] = {};
  for (int64_t r = 0; r < call.rows && r < kLanes; ++r) acc[r] = !call.first ? call.y[r] : call.bias ? call.bias[r] : 0.0f;

  const float* panel = call.panel;
  const uint8_t* index = call.index;
  const float* values = call.values;
  const int64_t stride = call.tile_vectors * kLanes;
  for (int64_t chunk = 0; chunk < call.chunks; ++chunk) {
    const int steps = chunk + 1 < call.chunks ? call.steps : call.last_steps;
    for (int s = 0; s < steps; ++s) {
      const bool pair_ends = s % 2 || s + 1 == steps;
      for (int r = 0; r < kLanes; ++r) {
        const uint32_t word = load<uint32_t>(values + r);
        const uint32_t bits = !call.bf16 ? word : s % 2 ? word & 0xffff0000 : word << 16;
        acc[r] += load<float>(&bits) * panel[(index[r] >> (s % 2 * 4)) & 15];
      }
      if (!call.bf16 || pair_ends) values += stride;
      if (pair_ends) index += stride;
    }
    panel += kLanes;
  }

  for (int64_t r = 0; r < call.rows && r < kLanes; ++r) call.y[r] = acc[r];
}

void fill(const FillCall& call) {
  const int groups = kLanes / call.slot;
  for (int64_t chunk = 0; chunk < call.chunks; ++chunk) {
    float* to = call.panel + chunk * kLanes;
    for (int i = 0; i < kLanes; ++i) {
      const int64_t column = ((call.first_chunk + chunk) * groups + i / call.slot) * call.m + i % call.slot;
      to[i] = i % call.slot < call.m && column < call.cols ? call.x[column] : 0.0f;
    }
  }
}

void gather(const GatherCall& call) {
  for (int64_t i = 0; i < call.chunks * kLanes; ++i) call.panel[i] = call.x[call.columns[i]];
}

constexpr Kernels kernels = {4, {1, 0}, {{tile, nullptr, nullptr}}, fill, gather, token_kernels<Plain>(), activate<Plain>};

}  // namespace

const Kernels* portable_kernels() { return &kernels; }
