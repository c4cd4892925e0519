// The little of onnxruntime's C interface that an operator needs, declared here, so that nothing of onnxruntime is
// needed to build. OrtApi is a table of functions that only ever grows at its end: the place of a function never
// changes. The places below were counted in onnxruntime_c_api.h; the last one appeared in version 1.17.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace ort {

constexpr uint32_t kVersion = 17;  // of the table and of CustomOp: asked for, and given by every later onnxruntime

// Opaque to us.
struct Status;
struct Value;
struct ShapeInfo;
struct KernelInfo;
struct KernelContext;
struct SessionOptions;
struct Domain;
using Table = void* const*;

struct ApiBase {
  Table (*get_table)(uint32_t version);  // null: onnxruntime is older than that
  const char* (*version_text)();
};

enum ErrorCode : int { kFail = 1, kInvalidArgument = 2 };
enum ElementType : int { kAnyType = 0, kFloat = 1, kUint8 = 2, kInt16 = 5, kInt32 = 6, kBFloat16Type = 16 };

enum Place : int {
  kCreateStatus = 0,
  kGetErrorMessage = 2,
  kCreateCustomOpDomain = 26,
  kCustomOpDomainAdd = 27,
  kAddCustomOpDomain = 28,
  kGetTensorMutableData = 51,
  kGetTensorElementType = 60,
  kGetDimensionsCount = 61,
  kGetDimensions = 62,
  kGetTensorTypeAndShape = 65,
  kKernelInfoGetAttributeInt = 86,
  kKernelContextGetInput = 90,
  kKernelContextGetOutput = 91,
  kReleaseStatus = 93,
  kReleaseShapeInfo = 99,
  kHasSessionConfigEntry = 237,
  kGetSessionConfigEntry = 238,
  kKernelInfoGetNodeName = 244,
  kKernelInfoGetConstantInput = 249,
  kKernelContextParallelFor = 274,
};

// An operator as onnxruntime calls it (OrtCustomOp as of kVersion, all members in order).
struct CustomOp {
  uint32_t version = kVersion;
  void* (*create)(const CustomOp*, Table, const KernelInfo*) = nullptr;  // unused: create_v2 is there
  const char* (*name)(const CustomOp*) = nullptr;
  const char* (*provider)(const CustomOp*) = nullptr;
  int (*input_type)(const CustomOp*, size_t) = nullptr;
  size_t (*inputs)(const CustomOp*) = nullptr;
  int (*output_type)(const CustomOp*, size_t) = nullptr;
  size_t (*outputs)(const CustomOp*) = nullptr;
  void (*compute)(void*, KernelContext*) = nullptr;  // unused: compute_v2 is there
  void (*destroy)(void*) = nullptr;
  int (*input_kind)(const CustomOp*, size_t) = nullptr;  // 0: required
  int (*output_kind)(const CustomOp*, size_t) = nullptr;
  int (*input_memory)(const CustomOp*, size_t) = nullptr;  // 0: the provider's own
  int (*variadic_inputs_min)(const CustomOp*) = nullptr;
  int (*variadic_inputs_same)(const CustomOp*) = nullptr;
  int (*variadic_outputs_min)(const CustomOp*) = nullptr;
  int (*variadic_outputs_same)(const CustomOp*) = nullptr;
  Status* (*create_v2)(const CustomOp*, Table, const KernelInfo*, void**) = nullptr;
  Status* (*compute_v2)(void*, KernelContext*) = nullptr;
  Status* (*infer_shape)(const CustomOp*, void*) = nullptr;  // null: the shapes written in the file hold
  int (*first_version)(const CustomOp*) = nullptr;
  int (*last_version)(const CustomOp*) = nullptr;
};

struct Error {
  std::string text;
};

// The table's functions with types. Those that can fail throw Error.
class Api {
 public:
  Api() = default;
  explicit Api(Table table) : table_(table) {}

  Status* status(const std::string& text) const {
    return at<Status* (*)(int, const char*)>(kCreateStatus)(kInvalidArgument, text.c_str());
  }
  Domain* create_domain(const char* name) const { return made<Domain*>(kCreateCustomOpDomain, name); }
  void add_op(Domain* domain, const CustomOp* op) const { call(kCustomOpDomainAdd, domain, op); }
  void add_domain(SessionOptions* options, Domain* domain) const { call(kAddCustomOpDomain, options, domain); }

  // "" where there is no such entry.
  std::string config_entry(const SessionOptions* options, const char* key) const {
    if (!made<int>(kHasSessionConfigEntry, options, key)) return "";
    size_t size = 0;  // with the final zero
    call(kGetSessionConfigEntry, options, key, static_cast<char*>(nullptr), &size);
    std::string text(size, '\0');
    call(kGetSessionConfigEntry, options, key, &text[0], &size);
    return text.c_str();
  }
  std::string node_name(const KernelInfo* info) const {
    size_t size = 0;
    call(kKernelInfoGetNodeName, info, static_cast<char*>(nullptr), &size);
    std::string text(size, '\0');
    call(kKernelInfoGetNodeName, info, &text[0], &size);
    return text.c_str();
  }
  int64_t attribute(const KernelInfo* info, const char* name) const {
    return made<int64_t>(kKernelInfoGetAttributeInt, info, name);
  }
  // Null when the input is not a constant of the file.
  const Value* constant_input(const KernelInfo* info, size_t index) const {
    int constant = 0;
    const Value* value = nullptr;
    call(kKernelInfoGetConstantInput, info, index, &constant, &value);
    return constant ? value : nullptr;
  }
  const Value* input(const KernelContext* context, size_t index) const {
    return made<const Value*>(kKernelContextGetInput, context, index);
  }
  Value* output(KernelContext* context, size_t index, const std::vector<int64_t>& shape) const {
    return made<Value*>(kKernelContextGetOutput, context, index, shape.data(), shape.size());
  }
  // Calls work(data, i) for every i in [0, count) on the session's threads, and waits.
  void parallel(const KernelContext* context, size_t count, void (*work)(void*, size_t), void* data) const {
    call(kKernelContextParallelFor, context, work, count, size_t(0), data);
  }
  template <typename T>
  T* data(const Value* value) const {
    return static_cast<T*>(made<void*>(kGetTensorMutableData, value));
  }
  std::vector<int64_t> shape(const Value* value) const {
    ShapeInfo* info = made<ShapeInfo*>(kGetTensorTypeAndShape, value);
    std::vector<int64_t> sizes(made<size_t>(kGetDimensionsCount, info));
    call(kGetDimensions, info, sizes.data(), sizes.size());
    at<void (*)(ShapeInfo*)>(kReleaseShapeInfo)(info);
    return sizes;
  }
  int element_type(const Value* value) const {
    ShapeInfo* info = made<ShapeInfo*>(kGetTensorTypeAndShape, value);
    const int type = made<int>(kGetTensorElementType, info);
    at<void (*)(ShapeInfo*)>(kReleaseShapeInfo)(info);
    return type;
  }

 private:
  template <typename F>
  F at(Place place) const {
    return reinterpret_cast<F>(table_[place]);
  }
  template <typename... Args>
  void call(Place place, Args... args) const {
    Status* failed = at<Status* (*)(Args...)>(place)(args...);
    if (!failed) return;
    Error error{at<const char* (*)(const Status*)>(kGetErrorMessage)(failed)};
    at<void (*)(Status*)>(kReleaseStatus)(failed);
    throw error;
  }
  template <typename T, typename... Args>
  T made(Place place, Args... args) const {
    T result{};
    call(place, args..., &result);
    return result;
  }

  Table table_ = nullptr;
};

}  // namespace ort
