// The token kernel: lanes are tokens. A block of P vectors of tokens lies in a panel [column][token]; each kept weight
// is one broadcast and P fused multiply-adds with memory operands. Written once over vectors of any width.
#pragma once
#include "vector.h"

namespace {  // one copy a file: each file is compiled for another instruction set

// A level is a type L: the vectors of Lanes<WIDTH>, and L::transpose(Float (&rows)[WIDTH]).

// Rows that are summed at once, so that 8 sums or more are in flight: 4 cycles a multiply-add, 2 of them each cycle.
constexpr int rows_at_once(int P) { return P == 1 ? 8 : P <= 3 ? 4 : P <= 6 ? 2 : 1; }

template <class L, int P, int ROWS>
SPARSEC_INLINE inline void sum_rows(const SumCall& call, int row) {
  using V = typename L::Float;
  constexpr int kVector = sizeof(V), kBlock = P * kVector;
  const char* panel = reinterpret_cast<const char*>(call.panel);
  char* to = reinterpret_cast<char*>(call.to) + row * kBlock;
  V acc[P * ROWS];
  if (call.from) {
    const char* from = reinterpret_cast<const char*>(call.from) + row * kBlock;
    each<P * ROWS>([&](auto i) SPARSEC_INLINE { acc[i] = load<V>(from + i * kVector); });
  } else {
    each<P * ROWS>([&](auto i) SPARSEC_INLINE { acc[i] = splat<V>(call.bias[row + i / P]); });
  }
  const uint16_t* offset = call.offsets + row;
  const float* weight = call.weights + row;
  auto step = [&](auto s) SPARSEC_INLINE {
    each<ROWS>([&](auto r) SPARSEC_INLINE {
      const char* x = panel + offset[s * kLanes + r];
      const V w = splat<V>(weight[s * kLanes + r]);
      each<P>([&](auto p) SPARSEC_INLINE { acc[r * P + p] = L::fma(w, load<V>(x + p * kVector), acc[r * P + p]); });
    });
  };
  constexpr int kUnroll = ROWS >= 4 ? 2 : 4;
  int64_t left = call.steps;
  for (; left >= kUnroll; left -= kUnroll) {
    each<kUnroll>(step);
    offset += kUnroll * kLanes;
    weight += kUnroll * kLanes;
  }
  for (; left > 0; --left) {
    step(std::integral_constant<int, 0>{});
    offset += kLanes;
    weight += kLanes;
  }
  each<P * ROWS>([&](auto i) SPARSEC_INLINE { store(to + i * kVector, acc[i]); });
}

template <class L, int P>
void sum(const SumCall& call) {
  constexpr int kRows = rows_at_once(P);
  // What the next row vector unpacks comes meanwhile, a part with each group of rows.
  const int64_t part = call.ahead_count * kRows / kLanes + 1;
  const char* ahead = static_cast<const char*>(call.ahead);
  for (int row = 0; row < call.rows; row += kRows) {
    for (int64_t i = 0; i < part; ++i, ahead += call.ahead_stride) __builtin_prefetch(ahead);
    sum_rows<L, P, kRows>(call, row);
  }
}

// 16 floats from 16 floats, or from the low or the high halves of 16 words.
enum class From { kFloats, kLow, kHigh };

template <class L, From FROM>
SPARSEC_INLINE inline void copy_step(float* to, const float* from) {
  using I = typename L::Int;
  constexpr int kWidth = sizeof(I) / sizeof(float);
  each<kLanes / kWidth>([&](auto i) SPARSEC_INLINE {
    I word = load<I>(from + i * kWidth);
    if (FROM == From::kLow) word = word << 16;
    if (FROM == From::kHigh) word = word & int32_t(0xffff0000);
    store(to + i * kWidth, word);
  });
}

template <class L, bool NIBBLES, bool BF16>
void unpack_as(const UnpackCall& call) {
  typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
  typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
  const int64_t stride = call.tile_vectors * kLanes, chunks = call.chunks;
  const uint8_t* index = call.index;
  const float* values = call.values;
  uint16_t* offset = call.offsets;
  float* weight = call.weights;
  const uint16_t column_bytes = uint16_t(call.column_bytes);
  const Bytes column = NIBBLES ? load<Bytes>(call.column) : Bytes{};
  int first = 0;  // column of the chunk
  // Stores to `offset` may change anything for all the compiler knows: nothing is read through `call` below.
  const int chunk_columns = call.chunk_columns, all_steps = call.steps, last_steps = call.last_steps;
  auto step = [&](const Bytes& which, int before, auto is_odd) SPARSEC_INLINE {
    constexpr From kFrom = !BF16 ? From::kFloats : is_odd ? From::kHigh : From::kLow;
    store(offset, Halves(__builtin_convertvector(which, Halves) * column_bytes + uint16_t(before * column_bytes)));
    copy_step<L, kFrom>(weight, values);
    if (kFrom != From::kLow) values += stride;
    offset += kLanes;
    weight += kLanes;
  };
  for (int64_t chunk = 0; chunk < chunks; ++chunk, first += chunk_columns) {
    const int steps = chunk + 1 < chunks ? all_steps : last_steps;
    for (int s = 0; s < steps; s += 2) {
      Bytes which = load<Bytes>(index);
      index += stride;
      step(NIBBLES ? __builtin_shuffle(column, which & 15) : which, first, std::false_type{});
      if (s + 1 == steps) break;
      if (!NIBBLES) {
        which = load<Bytes>(index);
        index += stride;
      }
      step(NIBBLES ? __builtin_shuffle(column, which >> 4) : which, first, std::true_type{});
    }
    if (BF16 && steps % 2) values += stride;
  }
}

template <class L>
void unpack(const UnpackCall& call) {
  if (call.bf16) return call.column ? unpack_as<L, true, true>(call) : unpack_as<L, false, true>(call);
  call.column ? unpack_as<L, true, false>(call) : unpack_as<L, false, false>(call);
}

// Tokens past the last one repeat it: their sums are never stored.
template <class L>
void transpose_in(const TransposeIn& call) {
  using V = typename L::Float;
  constexpr int kWidth = sizeof(V) / sizeof(float);
  for (int first = 0; first < call.block; first += kWidth) {
    const float* x[kWidth];
    for (int t = 0; t < kWidth; ++t) {
      const int token = first + t < call.tokens ? first + t : call.tokens - 1;
      x[t] = call.x + token * call.x_stride;
    }
    float* to = call.panel + first;
    if (call.columns < kWidth) {
      for (int64_t c = 0; c < call.columns; ++c)
        for (int t = 0; t < kWidth; ++t) to[c * call.block + t] = x[t][c];
      continue;
    }
    for (int64_t next = 0; next < call.columns; next += kWidth) {
      // The last vectors overlap those before: nothing beyond the columns is read.
      const int64_t column = next + kWidth <= call.columns ? next : call.columns - kWidth;
      V rows[kWidth];
      each<kWidth>([&](auto t) SPARSEC_INLINE { rows[t] = load<V>(x[t] + column); });
      L::transpose(rows);
      each<kWidth>([&](auto c) SPARSEC_INLINE { store(to + (column + c) * call.block, rows[c]); });
    }
  }
}

template <class L>
void copy(const CopyCall& call) {
  using V = typename L::Float;
  constexpr int kWidth = sizeof(V) / sizeof(float);
  const int block = call.block;  // stores may change anything for all the compiler knows, see `unpack_as`
  float* to = call.panel;
  for (int64_t i = 0; i < call.count; ++i) {
    const float* from = call.from + int64_t(call.columns[i]) * block;
    for (int t = 0; t < block; t += kWidth, to += kWidth) store(to, load<V>(from + t));
  }
}

template <class L>
void transpose_out(const TransposeOut& call) {
  using V = typename L::Float;
  constexpr int kWidth = sizeof(V) / sizeof(float);
  for (int first = 0; first < call.tokens; first += kWidth)
    for (int row = 0; row < call.rows; row += kWidth) {
      V rows[kWidth];
      each<kWidth>([&](auto r) SPARSEC_INLINE { rows[r] = load<V>(call.sums + int64_t(call.places[row + r]) * call.block + first); });
      L::transpose(rows);
      float* y = call.y + first * call.y_stride + row;
      const int tokens = call.tokens - first, left = call.rows - row;
      if (tokens >= kWidth && left >= kWidth) {
        each<kWidth>([&](auto t) SPARSEC_INLINE { store(y + t * call.y_stride, rows[t]); });
        continue;
      }
      for (int t = 0; t < kWidth && t < tokens; ++t)
        std::memcpy(y + t * call.y_stride, &rows[t], size_t(left < kWidth ? left : kWidth) * sizeof(float));
    }
}

template <class L, int... P>
constexpr TokenKernels token_kernels(std::integer_sequence<int, P...>) {
  return {sizeof(typename L::Float) / sizeof(float), {sum<L, P + 1>...}, unpack<L>, transpose_in<L>, copy<L>,
          transpose_out<L>};
}

template <class L>
constexpr TokenKernels token_kernels() {
  return token_kernels<L>(std::make_integer_sequence<int, kMaxVectors>{});
}

}  // namespace
