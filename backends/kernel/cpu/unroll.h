// each<N>(f): f(0), ..., f(N-1) with constant arguments. Arrays indexed by them become registers; a plain loop over an
// array of accumulators is unrolled too late by g++ 12 and leaves the array in memory (measured: 2 to 5 times slower).
#pragma once
#include <utility>

#define SPARSEC_INLINE __attribute__((always_inline))

namespace {  // one copy a file: each file is compiled for another instruction set

template <class F, int... I>
SPARSEC_INLINE inline void each_of(F&& f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}

template <int N, class F>
SPARSEC_INLINE inline void each(F&& f) {
  each_of(f, std::make_integer_sequence<int, N>{});
}

}  // namespace
