// Kernels for one combination of dtypes and storage forms each, beside the general ones of step.cu.
#pragma once

#include <vector>

#include "kernel.h"

namespace signadam::cuda {

struct FixedKernel {
  const char* name;
  RuleIndex rule;
  ThresholdPass threshold_pass;
  Storage storage;
  Formats formats;
  Scaling scaling;
  Kernel kernel;
};

// The lists of instances.h, each compiled in a file of its own.
const std::vector<FixedKernel>& fixed_plain();
const std::vector<FixedKernel>& fixed_stored();
const std::vector<FixedKernel>& fixed_two_moments();
const std::vector<FixedKernel>& fixed_thresholds();
const std::vector<FixedKernel>& fixed_scaled();

#define SIGNADAM_FIXED_KERNEL(Rule, ...) SIGNADAM_KERNEL_OF(Rule, Rule, none, __VA_ARGS__)
#define SIGNADAM_FIXED_SCALED_KERNEL(Rule, ...) SIGNADAM_KERNEL_OF(Scaled<Rule>, Rule, steps, __VA_ARGS__)

// `storage` as a table of such tensors has it, or with statistics.
#define SIGNADAM_KERNEL_OF(Functor, Rule, scaling, threshold_pass, storage, param, exp_avg, exp_avg_sq, param_storage) \
  FixedKernel{                                                                                                         \
      #Functor " " #threshold_pass " " #storage " " #param " " #exp_avg " " #exp_avg_sq " " #param_storage,            \
      rule_##Rule,                                                                                                     \
      ThresholdPass::threshold_pass,                                                                                   \
      Storage::storage,                                                                                                \
      {Format::param, Format::param, Format::exp_avg, Format::exp_avg_sq, Format::fp32, ParamStorage::param_storage},  \
      Scaling::scaling,                                                                                                \
      Kernel::of<Functor, ThresholdPass::threshold_pass, Storage::storage,                                             \
                 FixedForms<Format::param, Format::param, Format::exp_avg, Format::exp_avg_sq,                         \
                            ParamStorage::param_storage>>()},

}  // namespace signadam::cuda
