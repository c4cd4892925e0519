// The operator sparsec::NMLinear for onnxruntime on the CPU: y = x W^T + bias on the session's own threads.
//
//   inputs      x          (..., in_features) float
//               values     (1, rows, groups, n) float or bfloat16   \.
//               positions  (1, rows, bytes) uint8                   > constants of the file: the canonical tables, see layout.py
//               columns    (1, strips, groups, 4) uint8            /  strips: int16, int32; N:M: (1, 1, 1, m), 0 .. m-1
//               bias       (rows,) float
//   attributes  v (0: N:M), n, m (0: strips, whose columns are those of the weight), in_features
//
// The tables are checked and packed once, when a session is made; onnxruntime then shows any refusal to the user.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <new>
#include <stdexcept>
#include <thread>

#include "kernels.h"
#include "linear.h"
#include "ort_api.h"

extern "C" {
int sparsec_supports(int level);
int sparsec_pack(uint8_t* stream, int64_t nbytes, const Pattern* pattern, const void* values, const uint8_t* positions,
                 const int32_t* columns, const int32_t* rows);
}

namespace {

using ort::Error;
using Shape = std::vector<int64_t>;

constexpr const char* kThreadsKey = "sparsec.threads";  // session entry, set by sparsec.ort: the size of its pool
enum Input : size_t { kX, kValues, kPositions, kColumns, kBias, kInputs };
constexpr const char* kInputNames[] = {"x", "values", "positions", "columns", "bias"};

struct Op : ort::CustomOp {
  int threads;
};

struct alignas(64) Line {  // a stream must start at a multiple of 64 bytes
  uint8_t bytes[64];
};

struct Kernel {
  ort::Api api;
  std::string name;  // of the node
  int64_t rows, cols;
  std::vector<Line> stream;
  int64_t nbytes;
  int threads, level;
};

std::string text(const Shape& shape) {
  std::string out = "(";
  for (const int64_t size : shape) out += (out.size() > 1 ? ", " : "") + std::to_string(size);
  return out + ")";
}

int best_level() {
  static const std::map<std::string, int> names = {{"portable", 0}, {"avx2", 1}, {"avx512", 2}};
  const char* forced = std::getenv("SPARSEC_ISA");
  if (forced && *forced) {
    const auto found = names.find(forced);
    if (found == names.end())
      throw Error{std::string("SPARSEC_ISA=") + forced + " is not known here; expected avx512, avx2 or portable"};
    if (!sparsec_supports(found->second))
      throw Error{std::string("SPARSEC_ISA=") + forced + ", but this processor cannot run it"};
    return found->second;
  }
  int level = 2;
  while (!sparsec_supports(level)) --level;
  return level;
}

// A table of the file, with the shape that the attributes and the other tables ask for.
template <typename T>
const T* constant(const ort::Api& api, const ort::KernelInfo* info, Input input, const Shape& expected) {
  const ort::Value* value = api.constant_input(info, input);
  const Shape found = value ? api.shape(value) : Shape{};
  if (!value) throw Error{std::string(kInputNames[input]) + " must be a constant of the file"};
  if (found != expected)
    throw Error{std::string(kInputNames[input]) + " must have shape " + text(expected) + ", found " + text(found)};
  return api.data<T>(value);
}

// Bits are filled from the least significant one; each row starts a byte.
std::vector<uint8_t> unpack_positions(const uint8_t* packed, int64_t rows, int64_t fields, int bits) {
  const int64_t row_bytes = (fields * bits + 7) / 8;
  std::vector<uint8_t> positions(size_t(rows * fields));
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < fields; ++i) {
      unsigned field = 0;
      for (int b = 0; b < bits; ++b) {
        const int64_t bit = i * bits + b;
        field |= unsigned(packed[row * row_bytes + bit / 8] >> bit % 8 & 1) << b;
      }
      positions[size_t(row * fields + i)] = uint8_t(field);
    }
  }
  return positions;
}

// sparsec_pack checks every index. Left over: the values of padding slots, which a dense product would not see.
void check_values(const Geometry& g, const void* values) {
  const Pattern& p = g.pattern;
  for (int64_t i = 0; i < p.rows * g.groups * p.n; ++i) {
    float value;
    if (p.values == kBfloat16) {  // the upper half of a float
      const uint32_t bits = uint32_t(static_cast<const uint16_t*>(values)[i]) << 16;
      std::memcpy(&value, &bits, sizeof(value));
    } else {
      value = static_cast<const float*>(values)[i];
    }
    if (!std::isfinite(value)) throw Error{"the values must be finite numbers"};
    if (i % p.n >= g.real_slots(i / p.n % g.groups) && value != 0)
      throw Error{"a padding slot holds a value other than 0"};
  }
}

// As columns of the weight.
std::vector<int32_t> read_columns(const ort::Api& api, const ort::KernelInfo* info, const Geometry& g) {
  const Pattern& p = g.pattern;
  const void* table = constant<void>(api, info, kColumns, p.v ? Shape{1, g.strips, g.groups, 4} : Shape{1, 1, 1, p.m});
  const int type = api.element_type(api.constant_input(info, kColumns));
  const std::string wanted = p.columns == kStrip ? "int16 or int32" : "uint8";
  if (p.columns == kStrip ? type != ort::kInt16 && type != ort::kInt32 : type != ort::kUint8)
    throw Error{"columns must be " + wanted + ", found element type " + std::to_string(type)};
  std::vector<int32_t> columns(size_t(p.v ? g.strips * g.groups * 4 : p.m));
  for (size_t i = 0; i < columns.size(); ++i) {
    columns[i] = type == ort::kUint8   ? static_cast<const uint8_t*>(table)[i]
                 : type == ort::kInt16 ? static_cast<const int16_t*>(table)[i]
                                       : static_cast<const int32_t*>(table)[i];
    if (p.v && p.columns == kWindow) columns[i] += int32_t(int64_t(i) / 4 % g.groups * p.m);
    if (!p.v && columns[i] != int32_t(i)) throw Error{"columns of an N:M weight must be the offsets 0, 1, 2, ..."};
  }
  return columns;
}

void pack_tables(Kernel* kernel, const ort::KernelInfo* info) {
  const ort::Api& api = kernel->api;
  int64_t n = api.attribute(info, "n"), v = api.attribute(info, "v"), m = api.attribute(info, "m");
  const Columns from = v && !m ? kStrip : kWindow;
  const ort::Value* first = api.constant_input(info, kPositions);
  const Shape sizes = first ? api.shape(first) : Shape{};
  if (sizes.size() != 3) throw Error{"positions must be a constant of the file with shape (1, rows, bytes)"};
  kernel->rows = sizes[1];
  kernel->cols = api.attribute(info, "in_features");
  const ort::Value* stored = api.constant_input(info, kValues);
  const int type = stored ? api.element_type(stored) : ort::kFloat;
  if (type != ort::kFloat && type != ort::kBFloat16Type)
    throw Error{"values must be float or bfloat16, found element type " + std::to_string(type)};
  const ValueType value_type = type == ort::kFloat ? kFloat32 : kBfloat16;
  if (from == kStrip) {  // M is known by the number of groups
    const Shape kept = stored ? api.shape(stored) : Shape{};
    if (kept.size() != 4 || kept[2] < 1) throw Error{"values must be a constant with shape (1, rows, groups, n)"};
    m = std::max(int64_t(4), (kernel->cols + kept[2] - 1) / kept[2]);
  }
  Geometry g;
  if (!make_geometry({n, m, v, kernel->rows, kernel->cols, value_type, from}, &g))
    throw Error{"no kernel for n=" + std::to_string(n) + ", m=" + std::to_string(m) + ", v=" + std::to_string(v) +
                " of a weight " + std::to_string(kernel->rows) + " x " + std::to_string(kernel->cols)};
  const int64_t fields = g.groups * n;
  int bits = v ? 2 : 0;
  while (!v && (int64_t(1) << bits) < m) ++bits;
  const void* values = constant<void>(api, info, kValues, {1, g.pattern.rows, g.groups, n});
  const uint8_t* positions =
      constant<uint8_t>(api, info, kPositions, {1, g.pattern.rows, (fields * bits + 7) / 8});
  const std::vector<int32_t> columns = read_columns(api, info, g);
  check_values(g, values);
  kernel->nbytes = g.nbytes;
  kernel->stream.resize(size_t(g.nbytes + 63) / 64);
  const std::vector<uint8_t> unpacked = unpack_positions(positions, g.pattern.rows, fields, bits);
  if (sparsec_pack(kernel->stream[0].bytes, g.nbytes, &g.pattern, values, unpacked.data(), columns.data(), nullptr))
    throw Error{"a position or column is out of range: the file is damaged"};
}

// Where a kernel's shares run: the session's threads, in this call of the node.
struct Pool {
  const ort::Api* api;
  const ort::KernelContext* context;
};

void run_on_pool(void* pool, int count, void (*share)(void*, size_t), void* job) {
  const Pool& p = *static_cast<const Pool*>(pool);
  p.api->parallel(p.context, size_t(count), share, job);
}

void compute(const Kernel& kernel, ort::KernelContext* context) {
  const ort::Api& api = kernel.api;
  const ort::Value* x = api.input(context, kX);
  const ort::Value* bias = api.input(context, kBias);
  Shape shape = api.shape(x);
  if (shape.empty() || shape.back() != kernel.cols)
    throw Error{"x must have shape (..., " + std::to_string(kernel.cols) + "), found " + text(shape)};
  if (api.shape(bias) != Shape{kernel.rows})
    throw Error{"bias must have shape " + text({kernel.rows}) + ", found " + text(api.shape(bias))};
  shape.back() = kernel.rows;
  ort::Value* y = api.output(context, 0, shape);
  int64_t tokens = 1;
  for (size_t i = 0; i + 1 < shape.size(); ++i) tokens *= shape[i];
  if (!tokens) return;
  Pool pool = {&api, context};
  const int failed = linear(kernel.stream[0].bytes, kernel.nbytes, api.data<const float>(x), api.data<const float>(bias),
                            api.data<float>(y), tokens, kernel.rows, kernel.cols, kNone, 0,
                            {kernel.threads, run_on_pool, &pool}, kernel.level);
  if (failed == 4) throw std::bad_alloc();
  if (failed) throw Error{"the kernel refused its own stream, code " + std::to_string(failed)};
}

// onnxruntime is called through C: no exception may leave. `where` is empty or ends in ": ".
template <typename F>
ort::Status* guarded(const ort::Api& api, const std::string& where, F work) {
  try {
    work();
    return nullptr;
  } catch (const Error& error) {
    return api.status("sparsec: " + where + error.text);
  } catch (const std::exception& error) {
    return api.status("sparsec: " + where + error.what());
  }
}

ort::Status* create_kernel(const ort::CustomOp* op, ort::Table table, const ort::KernelInfo* info, void** out) {
  const ort::Api api(table);
  std::string name;
  if (ort::Status* failed = guarded(api, "", [&] { name = api.node_name(info); })) return failed;
  return guarded(api, name + ": ", [&] {
    auto kernel = std::make_unique<Kernel>();
    kernel->api = api;
    kernel->name = name;
    kernel->threads = static_cast<const Op*>(op)->threads;
    kernel->level = best_level();
    pack_tables(kernel.get(), info);
    *out = kernel.release();
  });
}

ort::Status* run_kernel(void* kernel, ort::KernelContext* context) {
  const Kernel& k = *static_cast<const Kernel*>(kernel);
  return guarded(k.api, k.name + ": ", [&] { compute(k, context); });
}

struct Registered {
  Op op;
  ort::Domain* domain;
};

// One operator a pool size, made once and kept: sessions hold pointers to it for as long as they live.
ort::Domain* domain_for(const ort::Api& api, int threads) {
  static std::mutex mutex;
  static std::map<int, Registered> registered;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [found, is_new] = registered.try_emplace(threads);
  if (!is_new) return found->second.domain;
  Op& op = found->second.op;
  op.threads = threads;
  op.name = [](const ort::CustomOp*) { return "NMLinear"; };
  op.provider = [](const ort::CustomOp*) -> const char* { return "CPUExecutionProvider"; };
  op.input_type = [](const ort::CustomOp*, size_t input) -> int {
    if (input == kValues || input == kColumns) return ort::kAnyType;  // pack_tables looks
    return input == kPositions ? ort::kUint8 : ort::kFloat;
  };
  op.inputs = [](const ort::CustomOp*) -> size_t { return kInputs; };
  op.output_type = [](const ort::CustomOp*, size_t) -> int { return ort::kFloat; };
  op.outputs = [](const ort::CustomOp*) -> size_t { return 1; };
  op.destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.input_kind = op.output_kind = op.input_memory = [](const ort::CustomOp*, size_t) { return 0; };
  op.variadic_inputs_min = op.variadic_inputs_same = [](const ort::CustomOp*) { return 1; };
  op.variadic_outputs_min = op.variadic_outputs_same = [](const ort::CustomOp*) { return 1; };
  op.create_v2 = create_kernel;
  op.compute_v2 = run_kernel;
  op.first_version = [](const ort::CustomOp*) { return 1; };
  op.last_version = [](const ort::CustomOp*) { return 1; };
  found->second.domain = api.create_domain("sparsec");
  api.add_op(found->second.domain, &op);
  return found->second.domain;
}

int pool_size(const ort::Api& api, const ort::SessionOptions* options) {
  const std::string given = api.config_entry(options, kThreadsKey);
  if (given.empty()) return std::max(1, int(std::thread::hardware_concurrency()));
  const int threads = std::atoi(given.c_str());
  if (threads < 1 || threads > 4096) throw Error{std::string(kThreadsKey) + " must be 1 to 4096, found " + given};
  return threads;
}

}  // namespace

// The name that onnxruntime looks for in a library of operators.
extern "C" __attribute__((visibility("default"))) ort::Status* RegisterCustomOps(ort::SessionOptions* options,
                                                                                 const ort::ApiBase* base) {
  const ort::Table table = base->get_table(ort::kVersion);
  if (!table) return ort::Api(base->get_table(1)).status("sparsec: onnxruntime 1.17 or later is needed");
  const ort::Api api(table);
  return guarded(api, "", [&] { api.add_domain(options, domain_for(api, pool_size(api, options))); });
}
