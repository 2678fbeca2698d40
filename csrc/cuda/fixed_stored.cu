#include "fixed.h"
#include "instances.h"

namespace signadam::cuda {

const std::vector<FixedKernel>& fixed_stored() {
  static const std::vector<FixedKernel> kernels{SIGNADAM_FIXED_STORED(SIGNADAM_FIXED_KERNEL)};
  return kernels;
}

}  // namespace signadam::cuda
