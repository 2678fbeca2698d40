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
  Kernel kernel;
};

// The lists of instances.h, each compiled in a file of its own.
const std::vector<FixedKernel>& fixed_plain();
const std::vector<FixedKernel>& fixed_stored();
const std::vector<FixedKernel>& fixed_two_moments();
const std::vector<FixedKernel>& fixed_thresholds();

// `storage` as a table of such tensors has it, or with statistics.
#define SIGNADAM_FIXED_KERNEL(Rule, threshold_pass, storage, param, exp_avg, exp_avg_sq, param_storage)               \
  FixedKernel{                                                                                                        \
      #Rule " " #threshold_pass " " #storage " " #param " " #exp_avg " " #exp_avg_sq " " #param_storage,              \
      rule_##Rule,                                                                                                    \
      ThresholdPass::threshold_pass,                                                                                  \
      Storage::storage,                                                                                               \
      {Format::param, Format::param, Format::exp_avg, Format::exp_avg_sq, Format::fp32, ParamStorage::param_storage}, \
      Kernel::of<Rule, ThresholdPass::threshold_pass, Storage::storage,                                               \
                 FixedForms<Format::param, Format::param, Format::exp_avg, Format::exp_avg_sq,                        \
                            ParamStorage::param_storage>>()},

}  // namespace signadam::cuda
