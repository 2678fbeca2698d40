// What comes before the update where the device itself begins a step: the sums for the norm of all gradients, and the
// step's data. Every address is the device's. Neither synchronizes; both throw std::runtime_error with CUDA's own words
// where the launch fails.
#pragma once

#include <vector>

#include "../block/norm.h"
#include "../core/program.h"
#include "step.h"

namespace signadam::cuda {

// One block for each chunk of the table.
void launch_norm(const TableView& table, const NormView& norm, uint32_t chunks, int device, void* stream);

// What a tensor's step is made of, as the host puts it on the device once.
struct BeginEntry {
  double* step;  // the number of steps taken
  uint64_t seed;
  int64_t param_id;
  int64_t program, row;  // of its group
};
static_assert(sizeof(BeginEntry) == 40);

struct BeginArguments {
  const BeginEntry* entries;
  const Instruction* programs;  // each of `program_length`
  const int32_t* results;       // each of scalar_count: the registers of the scalars
  const double* values;         // rows of `row_length`
  const double* control;        // what gradients are multiplied by; whether the step is skipped
  const void* const* grads;
  unsigned char* step;                                // StepLayout, with as many sets of scalars as tensors
  uint32_t grads_at, rng_keys_at, scalar_indices_at;  // offsets; no random bits: 0
  int32_t tensors, program_length, row_length;
};

// One thread for each tensor. Those that take part count the step; where it is skipped, none does.
void launch_begin(BeginArguments arguments, const StepLayout& layout, int device, void* stream);

struct DeviceStepKernel {
  const char* name;
  const void* function;
  int threads;  // of a block
};
std::vector<DeviceStepKernel> device_step_kernels();

}  // namespace signadam::cuda
