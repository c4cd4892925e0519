// One block of SparseGPT's sweep (sweep.py), for one instruction set: sweep.cpp includes this once for each.
// A vector holds kLanes rows of one column. Rows are taken some at a time, all of a block's columns for each, so that
// weights, errors and feedback of a step stay in the first-level cache.

constexpr int kLanes = SPARSEC_VECTOR / 4;
typedef float Floats __attribute__((vector_size(SPARSEC_VECTOR)));
typedef int32_t Marks __attribute__((vector_size(SPARSEC_VECTOR)));

SPARSEC_INLINE inline Floats all(float value) { return Floats{} + value; }

SPARSEC_INLINE inline Floats pick(const Marks& mark, const Floats& yes, const Floats& no) {
  return (Floats)((mark & (Marks)yes) | (~mark & (Marks)no));
}

// Adds to `moved` (columns x height) the errors of the block's first `before` columns, each times its feedback.
template <int kColumns, int kVectors>
SPARSEC_INLINE inline void add_feedback(
    const Block& b, int64_t before, int64_t column, const float* error, int64_t height, int64_t at, float* moved) {
  Floats sums[kColumns][kVectors];
  each<kColumns>([&](auto j) { each<kVectors>([&](auto k) { sums[j][k] = Floats{}; }); });
  for (int64_t i = 0; i < before; ++i) {
    const float* unit = b.unit + i * b.width + column;
    const Floats* from = (const Floats*)(error + i * height + at);
    each<kColumns>([&](auto j) {
      const Floats factor = all(unit[j]);
      each<kVectors>([&](auto k) { sums[j][k] += factor * from[k]; });
    });
  }
  each<kColumns>([&](auto j) {
    each<kVectors>([&](auto k) { ((Floats*)(moved + j * height + at))[k] += sums[j][k]; });
  });
}

template <int kColumns>
SPARSEC_INLINE inline void add_feedback_to_rows(
    const Block& b, int64_t before, int64_t column, const float* error, int64_t height, float* moved) {
  int64_t at = 0;
  constexpr int kTile = SPARSEC_VECTOR == 64 ? 4 : 2;  // registers: 32 of AVX-512, 16 of others
  for (; at + kTile * kLanes <= height; at += kTile * kLanes)
    add_feedback<kColumns, kTile>(b, before, column, error, height, at, moved);
  for (; at < height; at += kLanes) add_feedback<kColumns, 1>(b, before, column, error, height, at, moved);
}

// What one set gains: g_S (A_SS)^-1 g_S with g = A y.
template <int kKept>
SPARSEC_INLINE inline Floats gain_of(
    const Block& b, int64_t set, const float* inverses, const float* g, int64_t height) {
  const int32_t* columns = b.set + set * kKept;
  const float* inverse = inverses + set * kKept * kKept;
  Floats own[kKept], gain{};
  each<kKept>([&](auto k) { own[k] = *(const Floats*)(g + columns[k] * height); });
  each<kKept>([&](auto k) {
    Floats value = all(inverse[k * kKept]) * own[0];
    each<kKept - 1>([&](auto l) { value += all(inverse[k * kKept + l + 1]) * own[l + 1]; });
    gain += value * own[k];
  });
  return gain;
}

// For a vector of rows: the best of some sets by q g_S, its values q put in the place of y, 0 elsewhere. Of equal ones
// the first. `y` and `g`: columns x height; `matrices`: those of the group, exact where nothing is made up for.
template <int kKept>
SPARSEC_INLINE inline void choose(
    const Block& b, const int32_t* among, int64_t count, const float* matrices, const float* g, int64_t height,
    float* y) {
  Floats best[kKept], most = all(-1.0f);
  Marks place[kKept];
  each<kKept>([&](auto k) { best[k] = Floats{}, place[k] = Marks{} - 1; });
  for (int64_t i = 0; i < count; ++i) {
    const int64_t set = among ? among[i] : i;
    const int32_t* columns = b.set + set * kKept;
    const float* matrix = matrices + set * kKept * b.m;
    Floats values[kKept], gain{};
    each<kKept>([&](auto k) { values[k] = Floats{}; });
    for (int64_t j = 0; j < b.m; ++j) {
      const Floats own = *(const Floats*)(y + j * height);
      each<kKept>([&](auto k) { values[k] += all(matrix[k * b.m + j]) * own; });
    }
    each<kKept>([&](auto k) { gain += values[k] * *(const Floats*)(g + columns[k] * height); });
    const Marks better = (Marks)(gain > most);
    most = pick(better, gain, most);
    each<kKept>([&](auto k) {
      best[k] = pick(better, values[k], best[k]);
      place[k] = (better & columns[k]) | (~better & place[k]);
    });
  }
  for (int64_t j = 0; j < b.m; ++j) {
    Floats value{};
    each<kKept>([&](auto k) { value = pick((Marks)(place[k] == (int32_t)j), best[k], value); });
    *(Floats*)(y + j * height) = value;
  }
}

// The 4 columns of the group that keep most over all rows, as the 6 pairs inside them; `gains`: pairs x height.
SPARSEC_INLINE inline const int32_t* choose_columns(const Block& b, const float* gains, int64_t height) {
  const int32_t* best = b.pairs;
  float most = -1.0f;
  for (int64_t quad = 0; quad < b.quads; ++quad) {
    const int32_t* pairs = b.pairs + quad * kPairs;
    Floats sum{};
    for (int64_t at = 0; at < height; at += kLanes) {
      Floats largest = *(const Floats*)(gains + pairs[0] * height + at);
      each<kPairs - 1>([&](auto i) {
        const Floats other = *(const Floats*)(gains + pairs[i + 1] * height + at);
        largest = pick((Marks)(other > largest), other, largest);
      });
      sum += largest;
    }
    float total = 0;
    for (int i = 0; i < kLanes; ++i) total += sum[i];
    if (total > most) most = total, best = pairs;
  }
  return best;
}

template <int kKept>
void run_rows(const Block& b, int64_t first, int64_t count, float* scratch) {
  const int64_t height = b.height, group = b.m * height;
  float *error = scratch, *kept = error + b.width * height, *moved = kept + group, *g = moved + group, *gains = g + group;
  std::memset(scratch, 0, sizeof(float) * (b.width * height + 3 * group));  // rows that are not there
  for (int64_t a = 0; a < b.width; a += b.m) {
    const float* undo = b.undo + a * b.m;
    const float* hessian = b.hessian + a * b.m;
    const float* matrices = b.values + a * b.sets * kKept;
    float* own = error + a * height;
    for (int64_t j = 0; j < b.m; ++j) {
      std::memcpy(own + j * height, b.lost + (a + j) * b.rows + first, sizeof(float) * count);
      std::memcpy(moved + j * height, b.fed + (a + j) * b.rows + first, sizeof(float) * count);
    }
    int64_t j = 0;
    for (; j + 4 <= b.m; j += 4) add_feedback_to_rows<4>(b, a, a + j, error, height, moved + j * height);
    for (; j < b.m; ++j) add_feedback_to_rows<1>(b, a, a + j, error, height, moved + j * height);
    for (int64_t at = 0; at < height; at += kLanes) {
      // y = own + U moved takes the place of kept; then g = A y
      for (int64_t i = 0; i < b.m; ++i) {
        Floats y = *(const Floats*)(own + i * height + at);
        for (int64_t l = 0; l < b.m; ++l) y += all(undo[i * b.m + l]) * *(const Floats*)(moved + l * height + at);
        *(Floats*)(kept + i * height + at) = y;
      }
      for (int64_t i = 0; i < b.m; ++i) {
        Floats sum{};
        for (int64_t l = 0; l < b.m; ++l) sum += all(hessian[i * b.m + l]) * *(const Floats*)(kept + l * height + at);
        *(Floats*)(g + i * height + at) = sum;
      }
      if (!b.quads) choose<kKept>(b, nullptr, b.sets, matrices, g + at, height, kept + at);
    }
    if (b.quads) {
      const float* inverses = b.inverse + a / b.m * b.sets * kKept * kKept;
      for (int64_t set = 0; set < b.sets; ++set)
        for (int64_t at = 0; at < height; at += kLanes)
          *(Floats*)(gains + set * height + at) = gain_of<kKept>(b, set, inverses, g + at, height);
      const int32_t* pairs = choose_columns(b, gains, height);
      for (int64_t at = 0; at < height; at += kLanes)
        choose<kKept>(b, pairs, kPairs, matrices, g + at, height, kept + at);
    }
    for (int64_t i = 0; i < group; i += kLanes) *(Floats*)(own + i) -= *(const Floats*)(kept + i);
    for (int64_t j = 0; j < b.m; ++j)
      std::memcpy(b.lost + (a + j) * b.rows + first, own + j * height, sizeof(float) * count);
  }
}

inline void run(const Block& b, int64_t first, int64_t count, float* scratch) {
  if (b.n == 1) run_rows<1>(b, first, count, scratch);
  if (b.n == 2) run_rows<2>(b, first, count, scratch);
  if (b.n == 3) run_rows<3>(b, first, count, scratch);
  if (b.n == 4) run_rows<4>(b, first, count, scratch);
}
