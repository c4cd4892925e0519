// int8 in plain C++. The weights of a pair are expanded to all 8 columns, 16 rows each, so that loops run over rows.
#include <cstring>

#include "int8.h"

namespace int8 {

namespace {

template <int TOKENS>
void tile(const TileCall& call) {
  alignas(64) int32_t sums[TOKENS][kLanes] = {};
  for (int t = 0; t < call.tokens && !call.first; ++t)
    std::memcpy(sums[t], call.y + t * call.y_stride, size_t(call.rows) * 4);
  const int8_t* weights = reinterpret_cast<const int8_t*>(call.weights);
  const int8_t* x = reinterpret_cast<const int8_t*>(call.panel);
  for (int64_t pair = 0; pair < call.pairs; ++pair, weights += kExpanded, x += 8 * TOKENS)
    for (int t = 0; t < TOKENS; ++t)
      for (int column = 0; column < 8; ++column) {
        const int16_t value = x[t * 8 + column];
        for (int lane = 0; lane < kLanes; ++lane)
          sums[t][lane] += int16_t(int16_t(weights[column * kLanes + lane]) * value);  // at most 127 * 127
      }
  for (int t = 0; t < call.tokens; ++t) std::memcpy(call.y + t * call.y_stride, sums[t], size_t(call.rows) * 4);
}

void finish(const FinishCall& call) {
  for (int64_t row = 0; row < call.rows; ++row) {
    int32_t sum;
    std::memcpy(&sum, static_cast<int32_t*>(call.y) + row, 4);
    float y = float(sum) * call.token_scale * call.scales[row];
    if (call.bias) y += call.bias[row];  // not one instruction with the product: this level has none
    std::memcpy(static_cast<float*>(call.y) + row, &y, 4);
  }
}

void quantise(const QuantiseCall& call) {
  int32_t largest_bits = 0;  // magnitudes order like their bits, NaN above Inf above all numbers
  for (int64_t i = 0; i < call.cols; ++i) {
    int32_t bits;
    std::memcpy(&bits, call.x + i, 4);
    bits &= 0x7fffffff;
    largest_bits = bits > largest_bits ? bits : largest_bits;
  }
  const Scale scale = scale_of(largest_bits);
  *call.scale = scale.scale;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to nearest even
  for (int64_t i = 0; i < call.cols; ++i)
    call.to[i] = scale.factor == 0.0f ? int8_t(0) : int8_t(call.x[i] * scale.factor + kRound - kRound);
}

void fill(const FillCall& call) {
  const Geometry& g = *call.geometry;
  for (int64_t pair = 0; pair < call.pairs; ++pair)
    for (int t = 0; t < call.block; ++t)
      for (int i = 0; i < 8; ++i) {
        const int64_t group = (call.first_pair + pair) * 2 + i / 4;
        const bool real = t < call.tokens && group < g.groups;
        call.panel[(pair * call.block + t) * 8 + i] =
            real ? uint8_t(call.x[t * call.x_stride + group * g.shape.m + call.columns[group * 4 + i % 4]]) : 0;
      }
}

void expand(const ExpandCall& call) {
  std::memset(call.to, 0, size_t(call.pairs) * kExpanded);
  for (int64_t i = 0; i < call.pairs * kLanes; ++i)
    for (int k = 0; k < 4; ++k) {
      const int code = call.codes[i] >> (k / 2 * 4) & 15;
      const int column = k / 2 * 4 + kKept[code][k % 2];
      call.to[i / kLanes * kExpanded + column * kLanes + i % kLanes] = uint8_t(call.values[i * 4 + k]);
    }
}

constexpr Kernels kernels = {8, {1, 4, 0}, {tile<1>, tile<4>}, quantise, fill, expand, finish};

}  // namespace

const Kernels* portable_kernels() { return &kernels; }

}  // namespace int8
