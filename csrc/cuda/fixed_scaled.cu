#include "fixed.h"
#include "instances.h"

namespace signadam::cuda {

const std::vector<FixedKernel>& fixed_scaled() {
  static const std::vector<FixedKernel> kernels{SIGNADAM_FIXED_SCALED(SIGNADAM_FIXED_SCALED_KERNEL)};
  return kernels;
}

}  // namespace signadam::cuda
