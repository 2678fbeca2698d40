#include "fixed.h"
#include "instances.h"

namespace signadam::cuda {

const std::vector<FixedKernel>& fixed_two_moments() {
  static const std::vector<FixedKernel> kernels{SIGNADAM_FIXED_TWO_MOMENTS(SIGNADAM_FIXED_KERNEL)};
  return kernels;
}

}  // namespace signadam::cuda
