// The kernel over the chunks of a table, and its parameters.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <type_traits>

#include "../block/block.h"

namespace signadam::cuda {

// All kernel parameters together: 32764 bytes from CUDA 12.1 on, 4096 before. Each launch copies all that its kernel
// declares, so the kernels of most steps declare few.
constexpr std::size_t few_parameter_bytes = 4096;
#if CUDART_VERSION >= 12010
constexpr std::size_t many_parameter_bytes = 32764;
#else
constexpr std::size_t many_parameter_bytes = 4096;
#endif

struct alignas(16) LaunchHeader {
  TableView table;
  const unsigned char* step;                 // device memory, or null: then the bytes below
  uint32_t grads, rng_keys, scalar_indices;  // offsets of StepLayout; no random bits: 0
  uint32_t rule;                             // of kernels for any rule
};

template <std::size_t bytes>
struct LaunchArguments {
  LaunchHeader header;
  alignas(16) unsigned char step[(bytes - sizeof(LaunchHeader)) / 16 * 16];
};

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

  // By thread 0; nobody waits.
  template <class Phase>
  __device__ void alone(Phase phase) {
    if (threadIdx.x == 0) phase();
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

// Blocks on a multiprocessor at a time, which bounds the registers. With one moment in a fixed form 80 registers hold
// all without spills, and with none 64: left alone, the compiler takes more to fetch further ahead, and a block has to
// go. Two moments would spill there. In any form, two moments, sums beside an update, and the statistics do not fit 128
// registers on every architecture, nor do AdaBound's scalars: one block without spills.
template <class Rule, ThresholdPass threshold_pass, Storage storage, class Forms>
constexpr int blocks_at_once() {
  constexpr bool sums = storage == Storage::with_statistics || threshold_pass == ThresholdPass::same_pass;
  if constexpr (Forms::fixed)
    return threshold_pass != ThresholdPass::none || sums || Rule::moments > 1 ? 2 : 4 - Rule::moments;
  else
    return sums || (storage == Storage::any && Rule::moments > 1) || std::is_same_v<Rule, AdaBound> ? 1 : 2;
}

template <class Forms>
using ArgumentsOf = LaunchArguments<Forms::fixed ? few_parameter_bytes : many_parameter_bytes>;

template <class Rule, ThresholdPass threshold_pass, Storage storage, class Forms>
__global__ void __launch_bounds__(threads_per_block, (blocks_at_once<Rule, threshold_pass, storage, Forms>()))
    kernel(const __grid_constant__ ArgumentsOf<Forms> arguments) {
  const LaunchHeader& header = arguments.header;
  const unsigned char* bytes = header.step == nullptr ? arguments.step : header.step;
  const RngKey* rng_keys = nullptr;
  if constexpr (storage != Storage::plain)
    if ((storage == Storage::any && !std::is_same_v<Rule, AnyRule>) || header.rng_keys != 0)
      rng_keys = reinterpret_cast<const RngKey*>(bytes + header.rng_keys);
  const Step step{reinterpret_cast<const void* const*>(bytes + header.grads), rng_keys,
                  reinterpret_cast<const uint32_t*>(bytes + header.scalar_indices),
                  reinterpret_cast<const Scalars*>(bytes), header.rule};
  DeviceBlock block{nullptr, nullptr};
  if constexpr (threshold_pass != ThresholdPass::none) {
    __shared__ Sums lanes[lane_count];
    block.shared_lanes = lanes;
  }
  if constexpr (storage == Storage::with_statistics) {
    __shared__ ChunkStatistics chunk_statistics[threads_per_block];
    block.shared_statistics = chunk_statistics;
  }
  run_block<Rule, threshold_pass, storage, Forms>(block, header.table, step, blockIdx.x);
}

// A kernel as the host launches it.
struct Kernel {
  const void* function = nullptr;
  std::size_t inline_bytes = 0;  // of step data in its parameters

  template <class Rule, ThresholdPass threshold_pass, Storage storage, class Forms>
  static Kernel of() {
    return {reinterpret_cast<const void*>(kernel<Rule, threshold_pass, storage, Forms>),
            sizeof(ArgumentsOf<Forms>::step)};
  }
};

}  // namespace signadam::cuda
