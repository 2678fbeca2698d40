// The CUDA backend without a GPU, as a library for ctypes: the kernels of csrc/block.h over all blocks and threads, in
// the launches that csrc/cuda/step.cu and csrc/bindings.cpp make of them.
#include "host_block.h"

using namespace signadam;
using namespace signadam::host;

// One tensor, in 64-bit fields so that Python can fill it from a list.
struct TensorArguments {
  uint64_t param, exp_avg, exp_avg_sq, exp_avg_std, grad;
  int64_t numel, param_format, grad_format, row;
};

namespace {

using Launch = void (*)(const TableView&, const Step&, uint32_t, Order, uint32_t);

// As kernel_of in csrc/cuda/step.cu.
Launch launch_of(int rule, Statistics statistics) {
  if (statistics == Statistics::only) return launch<SignAdamPP, Statistics::only>;
  if (statistics == Statistics::gather)
    return rule == rule_SignAdamPP ? launch<SignAdamPP, Statistics::gather> : nullptr;
  switch (rule) {
#define SIGNADAM_CASE(Rule) \
  case rule_##Rule:         \
    return launch<Rule, Statistics::none>;
    SIGNADAM_RULES(SIGNADAM_CASE)
#undef SIGNADAM_CASE
    default:
      return nullptr;
  }
}

}  // namespace

extern "C" {

// One step of all tensors; `rows` holds rows of scalars in the order of SIGNADAM_SCALARS. Returns 0, 1 when there is no
// such kernel, 2 when a count of arrivals was left behind.
int cuda_on_host(int rule, int statistics_index, int64_t tensor_count, const TensorArguments* arguments,
                 int64_t row_count, const double* rows, int order, uint32_t seed) {
  auto statistics = static_cast<Statistics>(statistics_index);
  std::vector<TensorEntry> tensors;
  std::vector<uint32_t> tensor_of_chunk, row_of;
  std::vector<const void*> grads;
  for (int64_t i = 0; i < tensor_count; ++i) {
    const TensorArguments& a = arguments[i];
    TensorEntry entry{};
    entry.param = reinterpret_cast<void*>(a.param);
    entry.exp_avg = reinterpret_cast<float*>(a.exp_avg);
    entry.exp_avg_sq = reinterpret_cast<float*>(a.exp_avg_sq);
    entry.exp_avg_std = reinterpret_cast<double*>(a.exp_avg_std);
    entry.numel = a.numel;
    entry.first_chunk = static_cast<uint32_t>(tensor_of_chunk.size());
    entry.param_format = static_cast<Format>(a.param_format);
    entry.grad_format = static_cast<Format>(a.grad_format);
    entry.head = head_of(entry.param, entry.param_format);
    tensors.push_back(entry);
    tensor_of_chunk.insert(tensor_of_chunk.end(), static_cast<std::size_t>(chunks_of(a.numel)),
                           static_cast<uint32_t>(i));
    grads.push_back(reinterpret_cast<const void*>(a.grad));
    row_of.push_back(static_cast<uint32_t>(a.row));
  }
  std::vector<Scalars> scalars;
  for (int64_t i = 0; i < row_count; ++i) scalars.push_back(Scalars::from_row(rows + i * scalar_count));
  // The device's memory comes uninitialised.
  const double nan = std::numeric_limits<double>::quiet_NaN();
  std::vector<Sums> sums(tensor_of_chunk.size(), Sums{nan, nan});
  std::vector<uint32_t> arrivals(tensors.size(), 0);
  const TableView table{tensors.data(), tensor_of_chunk.data(), sums.data(), arrivals.data()};
  const Step step{grads.data(), row_of.data(), scalars.data()};
  const auto chunks = static_cast<uint32_t>(tensor_of_chunk.size());

  const auto run = [&](Statistics which) {
    const Launch function = launch_of(rule, which);
    if (function != nullptr) function(table, step, chunks, static_cast<Order>(order), seed);
    return function != nullptr;
  };
  if (statistics == Statistics::only) {
    if (!run(Statistics::only)) return 1;
    statistics = Statistics::none;
  }
  if (!run(statistics)) return 1;
  for (const uint32_t count : arrivals)
    if (count != 0) return 2;
  return 0;
}

// The conversions a kernel makes on loading and storing.
void widen_all(int format, int64_t count, const uint16_t* from, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = widen(static_cast<Format>(format), from[i]);
}

void narrow_all(int format, int64_t count, const float* from, uint16_t* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = narrow(static_cast<Format>(format), from[i]);
}

}  // extern "C"
