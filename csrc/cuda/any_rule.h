// The kernels that serve every rule: those of steps that are scaled, and of what scales them.
#pragma once

#include "kernel.h"

namespace signadam::cuda {

Kernel kernel_for_any_rule(ThresholdPass threshold_pass, Storage storage);

}  // namespace signadam::cuda
