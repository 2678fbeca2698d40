// The CUDA backend as the bindings see it: one launch over a device-resident table.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "../block/block.h"

namespace signadam::cuda {

// Step data in one run of bytes: scalars, gradient addresses, keys of random bits (of `drawing` tensors: all or none),
// indices of scalars.
struct StepLayout {
  std::size_t scalars, grads, rng_keys, scalar_indices, size;
  static StepLayout of(std::size_t scalar_sets, std::size_t tensors, std::size_t drawing);
};

// Which kernel serves a launch. `formats`: of all its tensors, or null where they differ.
struct KernelChoice {
  RuleIndex rule;
  ThresholdPass threshold_pass;
  Storage storage;
  const Formats* formats;
  Scaling scaling = Scaling::none;
};

// Bytes of step data that travel in the kernel's parameters; more goes by a copy.
std::size_t inline_capacity(const KernelChoice& choice);

// Launches on `stream` of `device`. The step data lies in device memory at `device_step`, which earlier work of the
// stream has filled; where that is null, it lies on the host at `inline_step`, at most `inline_capacity()` bytes, and
// is read before this returns. Never synchronizes; leaves the thread's current device as it was, and makes no context
// but on `device`. Throws std::runtime_error with CUDA's own words where this launch fails.
void launch(const KernelChoice& choice, const TableView& table, uint32_t chunks, const StepLayout& layout,
            const void* inline_step, const void* device_step, int device, void* stream);

// Empty when this module can run on `device`, otherwise the reason. Starts no context before it is called.
std::string unusable_reason(int device);

int runtime_version();

struct KernelInfo {
  std::string name;
  int registers, shared_bytes, local_bytes, max_threads, blocks_per_multiprocessor;
};
std::vector<KernelInfo> kernel_info(int device);

}  // namespace signadam::cuda
