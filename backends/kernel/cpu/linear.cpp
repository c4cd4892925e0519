// y = activation(x W^T + bias) from a stream: which kernel runs, on how many threads, and what each of them does.
#include "linear.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <new>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "job.h"

namespace {

constexpr double kBytesPerNanosecond = 15;  // of weights from the last-level cache to one core
constexpr double kSerialNanoseconds = 30e3;  // below this, waking a second thread costs more than it saves

// A panel of the row kernel takes three quarters of the first-level cache: the weights only stream through the rest.
// Measured with 48 KiB: 36 KiB is 3 to 7 % faster than 24 KiB. Half of the second-level cache for what waits there: a 4096 x 4096
// layer, whose weights come from memory once a superblock of the row kernel, gains 3 to 20 % from 12 blocks over 4.
CachePlan plan_caches() {
  int64_t first = 0, second = 0;
#ifdef _SC_LEVEL1_DCACHE_SIZE
  first = sysconf(_SC_LEVEL1_DCACHE_SIZE);
  second = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
  first = std::max(first, int64_t(32) * 1024);
  // The token kernel's offsets into a panel are 16 bits of bytes.
  return {std::min(first * 3 / 4, kMaxPanelBytes), std::min(first * 7 / 8, int64_t(1) << 16),
          std::max(second, int64_t(256) * 1024) / 2};
}

const Kernels* kernels_of(int level) {
#if defined(__x86_64__)
  if (level == 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    return avx512_kernels();
  if (level == 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2_kernels();
#endif
  return level == 0 ? portable_kernels() : nullptr;
}

// The number of tokens from which the token kernel is the faster one. 4 and 13 are measured on Zen 4, 30 on an Intel Xeon,
// whose one port for permutations serves multiply-adds too; elsewhere the row kernel is the measured one (Zen 5).
int64_t tokens_from(int level) {
  constexpr int64_t kNever = INT64_MAX;
#if defined(__x86_64__)
  if (level == 2) return __builtin_cpu_is("intel") ? 30 : kNever;
#endif
  return level == 1 ? 13 : 4;
}

// Wide streams have no row kernel: the token kernel is the faster one for any number of tokens. Where rows moved it shares
// tokens only among threads: each of them must have a vector.
bool runs_tokens(const Job& job, int64_t tokens, int kernel, int level, int64_t threads) {
  if (!job.geometry.slot) return true;
  if (kernel) return kernel == 2;
  return tokens >= tokens_from(level) && (!job.geometry.pattern.moved || tokens >= threads * job.kernels->tokens.width);
}

// A share of the threads' work: tokens or row vectors.
struct Shares {
  const Job* job;
  int64_t tokens, count;
  bool by_tokens, token_kernel;
  std::atomic<bool>* out_of_memory;
};

void run_share(void* shares, size_t id) {
  const Shares& s = *static_cast<const Shares*>(shares);
  const auto cut = [&](int64_t all) { return Range{all * int64_t(id) / s.count, all * int64_t(id + 1) / s.count}; };
  const int64_t vectors = s.job->geometry.vectors;
  const Range tokens = s.by_tokens ? cut(s.tokens) : Range{0, s.tokens};
  const Range rows = s.by_tokens ? Range{0, vectors} : cut(vectors);
  try {
    (s.token_kernel ? run_tokens : run_rows)(*s.job, tokens, rows);
  } catch (const std::bad_alloc&) {  // it must leave neither a thread of the team nor the C interface
    s.out_of_memory->store(true);
  }
}

int64_t useful_threads(const Job& job, int64_t tokens, int64_t threads) {
  const Geometry& g = job.geometry;
  const double weights = double(g.vectors) * kLanes * double(g.total_steps);
  const double compute = weights * double(tokens) / job.kernels->rate;
  const double stream = weights * 4.5 / kBytesPerNanosecond;
  return std::max(compute, stream) < kSerialNanoseconds ? 1 : threads;
}

#ifdef _OPENMP
void run_openmp(void*, int count, void (*share)(void*, size_t), void* job) {
#pragma omp parallel for num_threads(count) schedule(static, 1)
  for (int id = 0; id < count; ++id) share(job, size_t(id));
}
#else
void run_openmp(void*, int count, void (*share)(void*, size_t), void* job) {
  for (int id = 0; id < count; ++id) share(job, size_t(id));
}
#endif

}  // namespace

const CachePlan& caches() {
  static const CachePlan plan = plan_caches();
  return plan;
}

int linear(const uint8_t* stream, int64_t nbytes, const float* x, const float* bias, float* y, int64_t tokens,
           int64_t rows, int64_t cols, int activation, int kernel, const Team& team, int level) {
  if (activation < kNone || activation > kSilu || kernel < 0 || kernel > 2) return 3;
  Job job = {kernels_of(level), {}, stream, x, bias, Activation(activation), y};
  if (!read_header(stream, nbytes, &job.geometry)) return 1;
  if (job.geometry.pattern.rows != rows || job.geometry.pattern.cols != cols) return 1;
  if (!job.kernels) return 2;
  std::atomic<bool> out_of_memory{false};
  const int64_t threads = useful_threads(job, tokens, team.threads);
  Shares shares = {&job, tokens, threads, false, runs_tokens(job, tokens, kernel, level, threads), &out_of_memory};
  // Tokens cut no panel work in two; row vectors make every thread copy all activations, so only for few tokens: the
  // token kernel needs its largest blocks.
  const int64_t block = shares.token_kernel ? int64_t(kMaxVectors) * job.kernels->tokens.width : 32;
  shares.by_tokens = tokens >= shares.count * block || (shares.token_kernel && job.geometry.pattern.moved);
  if (shares.count > 1)
    team.run(team.pool, int(shares.count), run_share, &shares);
  else
    run_share(&shares, 0);
  return out_of_memory ? 4 : 0;
}

extern "C" {

// 1 when this processor can run the level: 0 portable, 1 AVX2 + FMA, 2 AVX-512.
int sparsec_supports(int level) { return kernels_of(level) != nullptr; }

// `linear` on OpenMP's threads.
int sparsec_linear(const uint8_t* stream, int64_t nbytes, const float* x, const float* bias, float* y, int64_t tokens,
                   int64_t rows, int64_t cols, int activation, int kernel, int threads, int level) {
  return linear(stream, nbytes, x, bias, y, tokens, rows, cols, activation, kernel, {threads, run_openmp, nullptr},
                level);
}

}  // extern "C"
