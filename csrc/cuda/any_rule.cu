// In a file of their own, which is compiled beside step.cu.
#include "any_rule.h"

namespace signadam::cuda {

Kernel kernel_for_any_rule(ThresholdPass threshold_pass, Storage storage) {
  if (threshold_pass == ThresholdPass::pass_before)
    return Kernel::of<AnyRule, ThresholdPass::pass_before, Storage::any, AnyForms>();
  return storage == Storage::with_statistics
             ? Kernel::of<AnyRule, ThresholdPass::same_pass, Storage::with_statistics, AnyForms>()
             : Kernel::of<AnyRule, ThresholdPass::same_pass, Storage::any, AnyForms>();
}

}  // namespace signadam::cuda
