// Greedy tokens from a model that `dsa-tvm export` has made, by ONNX Runtime and libdsa_tvm.so.
//
//   generate MODEL LIBRARY NEW < PROMPT
//
// PROMPT holds numbers of tokens, and NEW is how many tokens to make.
//
// The caches have a fixed capacity. One OrtValue is both their input and their output, so a step writes the rows of its
// tokens and copies nothing.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <iterator>
#include <string>
#include <vector>

#if __has_include(<onnxruntime_c_api.h>)
#include <onnxruntime_c_api.h>
#else  // the Python packages of ONNX Runtime have no headers; this one declares the few functions that are needed here
#include "ort/abi.h"
extern "C" const OrtApiBase *OrtGetApiBase();
#endif

static const OrtApi *const ort = OrtGetApiBase()->GetApi(ORT_API_VERSION);

static void check(OrtStatus *status) {
  if (!status) return;
  std::fprintf(stderr, "generate: %s\n", ort->GetErrorMessage(status));
  std::exit(1);
}

// A tensor that owns its numbers.
template <class T>
struct Tensor {
  std::vector<T> data;
  OrtValue *value = nullptr;

  Tensor(const std::vector<int64_t> &shape, std::vector<T> numbers, const OrtMemoryInfo *cpu) : data(std::move(numbers)) {
    const auto type = sizeof(T) == 8 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    check(ort->CreateTensorWithDataAsOrtValue(cpu, data.data(), data.size() * sizeof(T), shape.data(), shape.size(),
                                              type, &value));
  }
  Tensor(const Tensor &) = delete;
  Tensor(Tensor &&other) noexcept : data(std::move(other.data)), value(other.value) { other.value = nullptr; }
  ~Tensor() {
    if (value) ort->ReleaseValue(value);
  }
};

class Generator {
 public:
  Generator(const char *model, const char *library, int64_t capacity) {
    OrtEnv *env;
    OrtSessionOptions *options;
    OrtAllocator *allocator;
    void *handle;  // the library stays loaded
    size_t count;
    check(ort->CreateEnv(ORT_LOGGING_LEVEL_WARNING, "generate", &env));
    check(ort->CreateSessionOptions(&options));
    check(ort->RegisterCustomOpsLibrary(options, library, &handle));
    check(ort->CreateSession(env, model, options, &session_));
    check(ort->CreateCpuMemoryInfo(OrtDeviceAllocator, OrtMemTypeDefault, &cpu_));
    check(ort->GetAllocatorWithDefaultOptions(&allocator));
    check(ort->SessionGetInputCount(session_, &count));
    for (size_t i = 0; i < count; i++) {
      char *name;
      check(ort->SessionGetInputName(session_, i, allocator, &name));
      const std::string input = name;
      if (input.rfind("input.past_key_values.", 0) != 0) continue;
      OrtTypeInfo *type;
      const OrtTensorTypeAndShapeInfo *info;
      int64_t shape[3];  // batch, capacity, width
      check(ort->SessionGetInputTypeInfo(session_, i, &type));
      check(ort->CastTypeInfoToTensorInfo(type, &info));
      check(ort->GetDimensions(info, shape, 3));
      ort->ReleaseTypeInfo(type);
      caches_.emplace_back(std::vector<int64_t>{1, capacity, shape[2]},
                           std::vector<float>(static_cast<size_t>(capacity * shape[2])), cpu_);
      inputs_.push_back(input);
      outputs_.push_back("output" + input.substr(5));
    }
  }
  ~Generator() { ort->ReleaseSession(session_); }

  // Takes tokens behind those that were given before, and returns the likeliest one to follow.
  int64_t next(const std::vector<int64_t> &tokens) {
    const int64_t n = static_cast<int64_t>(tokens.size());
    std::vector<int64_t> places(tokens.size());
    for (int64_t &place : places) place = position_++;
    const Tensor<int64_t> ids({1, n}, tokens, cpu_), positions({1, n}, places, cpu_), keep({1}, {n - 1}, cpu_);
    std::vector<const char *> names{"input_ids", "position_ids", "logits_to_keep"}, output_names{"logits"};
    std::vector<const OrtValue *> inputs{ids.value, positions.value, keep.value};
    std::vector<OrtValue *> outputs{nullptr};  // ONNX Runtime allocates the logits
    for (size_t i = 0; i < caches_.size(); i++) {
      names.push_back(inputs_[i].c_str());
      inputs.push_back(caches_[i].value);
      output_names.push_back(outputs_[i].c_str());
      outputs.push_back(caches_[i].value);
    }
    check(ort->Run(session_, nullptr, names.data(), inputs.data(), inputs.size(), output_names.data(), outputs.size(),
                   outputs.data()));
    OrtTensorTypeAndShapeInfo *info;
    int64_t shape[3];  // batch, 1, vocabulary
    void *logits;
    check(ort->GetTensorTypeAndShape(outputs[0], &info));
    check(ort->GetDimensions(info, shape, 3));
    ort->ReleaseTensorTypeAndShapeInfo(info);
    check(ort->GetTensorMutableData(outputs[0], &logits));
    const float *first = static_cast<const float *>(logits);
    const int64_t best = std::max_element(first, first + shape[2]) - first;
    ort->ReleaseValue(outputs[0]);
    return best;
  }

 private:
  OrtSession *session_;
  OrtMemoryInfo *cpu_;
  std::vector<Tensor<float>> caches_;
  std::vector<std::string> inputs_, outputs_;
  int64_t position_ = 0;
};

int main(int argc, char **argv) {
  const int64_t count = argc == 4 ? std::atoll(argv[3]) : 0;
  const std::vector<int64_t> prompt{std::istream_iterator<int64_t>(std::cin), {}};
  if (count < 1 || prompt.empty()) {
    std::fputs("usage: generate MODEL LIBRARY NEW < PROMPT, with a token in PROMPT at least\n", stderr);
    return 2;
  }
  Generator generator(argv[1], argv[2], static_cast<int64_t>(prompt.size()) + count);
  int64_t token = 0;
  const size_t chunk = 512;  // tokens of the prompt at a time: more of them take more memory
  for (size_t i = 0; i < prompt.size(); i += chunk)
    token = generator.next({prompt.begin() + i, prompt.begin() + std::min(i + chunk, prompt.size())});
  for (int64_t i = 0; i < count; i++) {
    if (i) token = generator.next({token});
    std::cout << (i ? " " : "") << token << std::flush;
  }
  std::cout << std::endl;
}
