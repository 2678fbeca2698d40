// What a kernel is compiled for: sums, storage, and which dtypes and storage forms it serves.
#pragma once

#include "../core/table.h"

namespace signadam {

enum class ThresholdPass {
  none,         // update only
  same_pass,    // update, and sum the gradient for the next step's threshold (adaptive_delayed)
  pass_before,  // sum the gradient for this step's threshold (adaptive, first launch)
};

// `plain`: tables of plain tensors only, and rules that have no auxiliary operand; `any`: all; `with_statistics`: all,
// and gathers the statistics of each chunk.
enum class Storage { plain, any, with_statistics };

// What of each tensor's own multiplies its steps.
enum class Scaling {
  none,
  norm,   // the corrected gradient's norm, in the place of a threshold
  steps,  // the share of entries that agree, or the parameter's root mean square, outside of the rule
};

// Of one launch of a step: to the update a norm is a threshold.
constexpr Scaling scaling_of(ThresholdPass threshold_pass, Scaling of_step) {
  return threshold_pass != ThresholdPass::pass_before && of_step == Scaling::norm ? Scaling::none : of_step;
}

// Dtypes and storage forms: all, tested where they matter, or one combination, known when the kernel is compiled. A
// test of a format for each element of an unrolled loop takes more than half of what a few-bit step executes.

struct AnyForms {
  static constexpr bool fixed = false;
  static SIGNADAM_HD void fix(Formats&) {}
};

// Of rules without an auxiliary operand.
template <Format param, Format grad, Format exp_avg, Format exp_avg_sq, ParamStorage param_storage>
struct FixedForms {
  static constexpr bool fixed = true;
  static constexpr Formats formats{param, grad, exp_avg, exp_avg_sq, Format::fp32, param_storage};
  // What a table says already, so that the compiler knows it.
  static SIGNADAM_HD void fix(Formats& of_tensor) {
    of_tensor = {param, grad, exp_avg, exp_avg_sq, Format::fp32, param_storage};
  }
};

// The sums of a gradient depend on nothing but what the effective gradient is made of.
inline Formats read_before(const Formats& formats) {
  const bool nothing_beside = formats.param_storage == ParamStorage::stochastic;
  return {formats.param, formats.grad, Format::fp32,
          Format::fp32,  Format::fp32, nothing_beside ? ParamStorage::nearest : formats.param_storage};
}

}  // namespace signadam
