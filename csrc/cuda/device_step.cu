#include "device_step.h"

#include "kernel.h"
#include "runtime.h"

namespace signadam::cuda {
namespace {

struct NormArguments {
  TableView table;
  NormView norm;
};

__global__ void __launch_bounds__(threads_per_block) norm_kernel(const __grid_constant__ NormArguments arguments) {
  __shared__ double lanes[lane_count];
  DeviceBlock block{nullptr, nullptr};
  run_norm_block(block, arguments.table, arguments.norm, lanes, blockIdx.x);
}

// A warp: its registers of programs take little shared memory, and neighbours mostly run the same program.
constexpr int begin_threads = 32;

// The registers of one thread; neighbouring threads have neighbouring words.
struct Registers {
  double* first;
  __device__ double& operator[](int index) const { return first[index * begin_threads]; }
};

// The scalars that a program has left in registers.
struct Results {
  Registers registers;
  const int32_t* places;
  __device__ double operator[](int scalar) const { return registers[places[scalar]]; }
};

__global__ void __launch_bounds__(begin_threads) begin_kernel(const __grid_constant__ BeginArguments arguments) {
  __shared__ double shared[program_registers * begin_threads];
  const int index = static_cast<int>(blockIdx.x) * begin_threads + static_cast<int>(threadIdx.x);
  if (index >= arguments.tensors) return;
  unsigned char* const step = arguments.step;
  const void* const grad = arguments.control[1] != 0.0 ? nullptr : arguments.grads[index];
  reinterpret_cast<const void**>(step + arguments.grads_at)[index] = grad;
  if (grad == nullptr) return;

  const BeginEntry entry = arguments.entries[index];
  const double t = *entry.step + 1.0;
  *entry.step = t;
  const Registers registers{shared + threadIdx.x};
  registers[register_t] = t;
  registers[register_factor] = arguments.control[0];
  const double* const row = arguments.values + entry.row * arguments.row_length;
  for (int i = 0; i < arguments.row_length; ++i) registers[register_values + i] = row[i];
  run_program(arguments.programs + entry.program * arguments.program_length, arguments.program_length, registers);
  const Results results{registers, arguments.results + entry.program * scalar_count};
  reinterpret_cast<Scalars*>(step)[index] = Scalars::from_set(results);
  if (arguments.rng_keys_at != 0)
    reinterpret_cast<RngKey*>(step + arguments.rng_keys_at)[index] =
        RngKey::of(entry.seed, static_cast<uint32_t>(entry.param_id), static_cast<uint64_t>(t));
  reinterpret_cast<uint32_t*>(step + arguments.scalar_indices_at)[index] = static_cast<uint32_t>(index);
}

}  // namespace

void launch_norm(const TableView& table, const NormView& norm, uint32_t chunks, int device, void* stream) {
  NormArguments arguments{table, norm};
  start(norm_kernel, chunks, arguments, device, stream, "to launch the sums of squares");
}

void launch_begin(BeginArguments arguments, const StepLayout& layout, int device, void* stream) {
  const auto offset = [](std::size_t bytes) { return static_cast<uint32_t>(bytes); };
  arguments.grads_at = offset(layout.grads);
  arguments.rng_keys_at = layout.rng_keys == layout.scalar_indices ? 0 : offset(layout.rng_keys);
  arguments.scalar_indices_at = offset(layout.scalar_indices);
  const int64_t blocks = (arguments.tensors + begin_threads - 1) / begin_threads;
  start(begin_kernel, blocks, arguments, device, stream, "to launch the beginning of a step", begin_threads);
}

std::vector<DeviceStepKernel> device_step_kernels() {
  return {{"norm", reinterpret_cast<const void*>(norm_kernel), threads_per_block},
          {"begin", reinterpret_cast<const void*>(begin_kernel), begin_threads}};
}

}  // namespace signadam::cuda
