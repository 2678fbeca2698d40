#include "step.h"

#include "runtime.h"

namespace signadam::cuda {
namespace {

// All kernel parameters together: 32764 bytes from CUDA 12.1 on, 4096 before.
#if CUDART_VERSION >= 12010
constexpr std::size_t parameter_bytes = 32764;
#else
constexpr std::size_t parameter_bytes = 4096;
#endif

struct alignas(16) LaunchHeader {
  TableView table;
  const unsigned char* step;                 // device memory, or null: then the bytes below
  uint32_t grads, rng_keys, scalar_indices;  // offsets of StepLayout; no random bits: 0
};

constexpr std::size_t inline_bytes = (parameter_bytes - sizeof(LaunchHeader)) / 16 * 16;

struct LaunchArguments {
  LaunchHeader header;
  alignas(16) unsigned char step[inline_bytes];
};
static_assert(sizeof(LaunchArguments) <= parameter_bytes);

struct DeviceBlock {
  Sums* shared_lanes;
  ChunkStatistics* shared_statistics;

  __device__ Sums* lanes() const { return shared_lanes; }
  __device__ ChunkStatistics* chunk_statistics() const { return shared_statistics; }

  template <class Phase>
  __device__ void each(Phase phase) {
    phase(static_cast<int>(threadIdx.x));
    __syncthreads();
  }

  // `first` gives each thread's share of a maximum over four neighbours, which `second` gets; what it keeps in between
  // stays in registers. All threads of a warp must come here.
  template <class State, class First, class Second>
  __device__ void in_fours(First first, Second second) {
    State state;
    uint32_t largest = first(static_cast<int>(threadIdx.x), state);
    largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
    largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
    second(static_cast<int>(threadIdx.x), state, largest);
  }

  // True in all threads of the block that is the last of `expected` to come here; resets the counter.
  __device__ bool arrives_last(uint32_t* counter, uint32_t expected) {
    int last = 0;
    if (threadIdx.x == 0) {
      __threadfence();
      last = atomicAdd(counter, 1u) == expected - 1;
      if (last) *counter = 0;
      __threadfence();
    }
    return __syncthreads_or(last);
  }
};

// Blocks on a multiprocessor at a time. Two moments beside an exponent that four threads share, and the statistics,
// do not fit 128 registers: one block without spills.
template <class Rule, Storage storage>
constexpr int blocks_at_once =
    storage == Storage::with_statistics || (storage == Storage::any && Rule::moments > 1 && !Rule::bounded) ? 1 : 2;

template <class Rule, ThresholdPass threshold_pass, Storage storage>
__global__ void __launch_bounds__(threads_per_block, blocks_at_once<Rule, storage>)
    kernel(const __grid_constant__ LaunchArguments arguments) {
  const LaunchHeader& header = arguments.header;
  const unsigned char* bytes = header.step == nullptr ? arguments.step : header.step;
  const RngKey* rng_keys = nullptr;
  if constexpr (storage != Storage::plain)
    if (storage == Storage::any || header.rng_keys != 0)
      rng_keys = reinterpret_cast<const RngKey*>(bytes + header.rng_keys);
  const Step step{reinterpret_cast<const void* const*>(bytes + header.grads), rng_keys,
                  reinterpret_cast<const uint32_t*>(bytes + header.scalar_indices),
                  reinterpret_cast<const Scalars*>(bytes)};
  DeviceBlock block{nullptr, nullptr};
  if constexpr (threshold_pass != ThresholdPass::none) {
    __shared__ Sums lanes[lane_count];
    block.shared_lanes = lanes;
  }
  if constexpr (storage == Storage::with_statistics) {
    __shared__ ChunkStatistics chunk_statistics[threads_per_block];
    block.shared_statistics = chunk_statistics;
  }
  run_block<Rule, threshold_pass, storage>(block, header.table, step, blockIdx.x);
}

using Kernel = void (*)(LaunchArguments);

template <class Rule, Storage storage>
Kernel update_kernel() {
  if constexpr (storage == Storage::plain && has_third<Rule>)
    return nullptr;
  else
    return kernel<Rule, ThresholdPass::none, storage>;
}

// Only a gated rule gathers statistics; the first launch of the exact form is the same for all of them.
template <Storage storage>
Kernel kernel_of(RuleIndex rule, ThresholdPass threshold_pass) {
  if (threshold_pass == ThresholdPass::pass_before)
    return kernel < SignAdamPP, ThresholdPass::pass_before,
           storage == Storage::plain ? Storage::plain : Storage::any > ;
  if (threshold_pass == ThresholdPass::same_pass)
    return rule == rule_SignAdamPP ? kernel<SignAdamPP, ThresholdPass::same_pass, storage> : nullptr;
  switch (rule) {
#define SIGNADAM_CASE(Rule) \
  case rule_##Rule:         \
    return update_kernel<Rule, storage>();
    SIGNADAM_RULES(SIGNADAM_CASE)
#undef SIGNADAM_CASE
    default:
      return nullptr;
  }
}

Kernel kernel_of(RuleIndex rule, ThresholdPass threshold_pass, Storage storage) {
  switch (storage) {
    case Storage::plain:
      return kernel_of<Storage::plain>(rule, threshold_pass);
    case Storage::any:
      return kernel_of<Storage::any>(rule, threshold_pass);
    default:
      return kernel_of<Storage::with_statistics>(rule, threshold_pass);
  }
}

}  // namespace

StepLayout StepLayout::of(std::size_t scalar_sets, std::size_t tensors, std::size_t drawing) {
  StepLayout layout{};
  layout.grads = scalar_sets * sizeof(Scalars);
  layout.rng_keys = layout.grads + tensors * sizeof(void*);
  layout.scalar_indices = layout.rng_keys + drawing * sizeof(RngKey);
  layout.size = layout.scalar_indices + tensors * sizeof(uint32_t);
  return layout;
}
static_assert(sizeof(Scalars) % alignof(void*) == 0);

std::size_t inline_capacity() { return inline_bytes; }

void launch(RuleIndex rule, ThresholdPass threshold_pass, Storage storage, const TableView& table, uint32_t chunks,
            const StepLayout& layout, const void* inline_step, const void* device_step, int device, void* stream) {
  const Kernel function = kernel_of(rule, threshold_pass, storage);
  if (function == nullptr) throw std::runtime_error("no CUDA kernel for this rule with a threshold of its own");
  LaunchArguments arguments;
  const auto offset = [](std::size_t bytes) { return static_cast<uint32_t>(bytes); };
  arguments.header = {table, static_cast<const unsigned char*>(device_step), offset(layout.grads),
                      layout.rng_keys == layout.scalar_indices ? 0 : offset(layout.rng_keys),
                      offset(layout.scalar_indices)};
  if (device_step == nullptr) {
    if (layout.size > inline_bytes) throw std::runtime_error("the step data does not fit the kernel's parameters");
    std::memcpy(arguments.step, inline_step, layout.size);
  }
  start(function, chunks, arguments, device, stream, "to launch the update");
}

std::string unusable_reason(int device) {
  int driver = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) {
    cudaGetLastError();
    return "no NVIDIA driver is loaded";
  }
  const auto version = [](int v) { return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10); };
  // Within a major version an older driver serves a newer runtime.
  if (driver / 1000 < CUDART_VERSION / 1000)
    return "the driver supports CUDA " + version(driver) + ", the module was built with CUDA " +
           version(CUDART_VERSION);
  int count = 0;
  if (const auto status = cudaGetDeviceCount(&count); status != cudaSuccess) {
    cudaGetLastError();
    return cudaGetErrorString(status);
  }
  if (device >= count) return "there is no device " + std::to_string(device);
  try {
    const DeviceGuard guard(device);
    cudaFuncAttributes attributes{};
    const auto status =
        cudaFuncGetAttributes(&attributes, kernel_of(rule_SignSGD, ThresholdPass::none, Storage::plain));
    if (status == cudaSuccess) return "";
    cudaGetLastError();
    int major = 0, minor = 0;
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "to read the device's capability");
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "to read the device's capability");
    return "the module has no code for sm_" + std::to_string(10 * major + minor) + " (" + cudaGetErrorString(status) +
           ")";
  } catch (const std::runtime_error& error) {
    return error.what();
  }
}

int runtime_version() { return CUDART_VERSION; }

std::vector<KernelInfo> kernel_info(int device) {
  const DeviceGuard guard(device);
  std::vector<KernelInfo> infos;
  const auto add = [&infos](std::string name, Kernel function) {
    if (function == nullptr) return;
    cudaFuncAttributes a{};
    check(cudaFuncGetAttributes(&a, function), "to read kernel attributes");
    int blocks = 0;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, function, threads_per_block, 0), "to read occupancy");
    infos.push_back({std::move(name), a.numRegs, static_cast<int>(a.sharedSizeBytes),
                     static_cast<int>(a.localSizeBytes), threads_per_block, blocks});
  };
  for (const Storage storage : {Storage::plain, Storage::any, Storage::with_statistics}) {
    const std::string suffix = storage == Storage::plain ? ""
                               : storage == Storage::any ? "+stored"
                                                         : "+step_statistics";
#define SIGNADAM_ADD(Rule) add(Rule::name + suffix, kernel_of(rule_##Rule, ThresholdPass::none, storage));
    SIGNADAM_RULES(SIGNADAM_ADD)
#undef SIGNADAM_ADD
    add("sign_adam_pp+same_pass" + suffix, kernel_of(rule_SignAdamPP, ThresholdPass::same_pass, storage));
    if (storage != Storage::with_statistics)
      add("pass_before" + suffix, kernel_of(rule_SignAdamPP, ThresholdPass::pass_before, storage));
  }
  return infos;
}

}  // namespace signadam::cuda
