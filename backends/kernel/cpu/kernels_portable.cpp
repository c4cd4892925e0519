// Plain C++ for any machine.
#include "kernels.h"
#include "vector.h"

namespace {

template <int TOKENS>
void tile(const TileCall& call) {
  float acc[TOKENS][kLanes] = {};
  for (int64_t t = 0; t < call.tokens; ++t)
    for (int64_t r = 0; r < call.rows && r < kLanes; ++r)
      acc[t][r] = !call.first ? call.y[t * call.y_stride + r] : call.bias ? call.bias[r] : 0.0f;

  const float* panel = call.panel;
  const uint8_t* index = call.index;
  const float* values = call.values;
  const int64_t stride = call.tile_vectors * kLanes;
  for (int64_t chunk = 0; chunk < call.chunks; ++chunk) {
    const int steps = chunk + 1 < call.chunks ? call.steps : call.last_steps;
    for (int s = 0; s < steps; ++s) {
      for (int r = 0; r < kLanes; ++r) {
        const int which = (index[r] >> (s % 2 * 4)) & 15;
        for (int t = 0; t < TOKENS; ++t) acc[t][r] += values[r] * panel[16 * t + which];
      }
      values += stride;
      if (s % 2 || s + 1 == steps) index += stride;
    }
    panel += 16 * TOKENS;
  }

  for (int64_t t = 0; t < call.tokens; ++t)
    for (int64_t r = 0; r < call.rows && r < kLanes; ++r) call.y[t * call.y_stride + r] = acc[t][r];
}

void fill(const FillCall& call) {
  const int groups = 16 / call.slot;
  for (int64_t chunk = 0; chunk < call.chunks; ++chunk) {
    float* to = call.panel + chunk * call.block * 16;
    for (int i = 0; i < call.block * 16; ++i) to[i] = 0.0f;
    for (int t = 0; t < call.tokens; ++t)
      for (int g = 0; g < groups; ++g) {
        const int64_t column = ((call.first_chunk + chunk) * groups + g) * call.m;
        for (int i = 0; i < call.m && column + i < call.cols; ++i)
          to[16 * t + g * call.slot + i] = call.x[t * call.cols + column + i];
      }
  }
}

void gather(const GatherCall& call) {
  const int64_t rows = call.rows < kLanes ? call.rows : kLanes;
  for (int64_t t = 0; t < call.tokens; ++t) {
    float acc[kLanes] = {};
    for (int64_t r = 0; r < rows; ++r) acc[r] = call.bias ? call.bias[r] : 0.0f;
    const float* x = call.x + t * call.x_stride;
    for (int64_t step = 0; step < call.groups * call.n; ++step)
      for (int r = 0; r < kLanes; ++r) {
        const int64_t at = step * call.tile_vectors * kLanes + r;
        acc[r] += call.values[at] * x[step / call.n * call.m + call.index[at]];
      }
    for (int64_t r = 0; r < rows; ++r) call.y[t * call.y_stride + r] = acc[r];
  }
}

constexpr Kernels kernels = {
    {4, 4},
    {1, 4, 0},
    {{tile<1>, nullptr, nullptr}, {tile<4>, nullptr, nullptr}},
    fill,
    gather,
    activate<Lanes<4>>,
};

}  // namespace

const Kernels* portable_kernels() { return &kernels; }
