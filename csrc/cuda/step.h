// The CUDA backend as the bindings see it: one launch over a device-resident table.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "../block.h"

namespace signadam::cuda {

// Step data in one run of bytes: scalars, gradient addresses, noise (of `noisy` tensors: all or none), rows.
struct StepLayout {
  std::size_t scalars, grads, noise, rows, size;
  static StepLayout of(std::size_t scalar_rows, std::size_t tensors, std::size_t noisy);
};

// Bytes of step data that travel in the kernel's parameters; more goes by a copy.
std::size_t inline_capacity();

// Launches on `stream` of `device`. `host_step` holds the step data; when it exceeds the inline capacity it is copied
// to `device_step` first, stream-ordered, and must lie in pinned memory that stays until the copy is done.
// Never synchronizes. Throws std::runtime_error with CUDA's own words.
void launch(RuleIndex rule, Statistics statistics, Storage storage, const TableView& table, uint32_t chunks,
            const StepLayout& layout, const void* host_step, void* device_step, int device, void* stream);

// Empty when this module can run on `device`, otherwise the reason. Starts no context before it is called.
std::string unusable_reason(int device);

int runtime_version();

struct KernelInfo {
  std::string name;
  int registers, shared_bytes, local_bytes, max_threads, blocks_per_multiprocessor;
};
std::vector<KernelInfo> kernel_info(int device);

}  // namespace signadam::cuda
