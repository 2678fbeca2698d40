#include "fixed.h"
#include "instances.h"

namespace signadam::cuda {

const std::vector<FixedKernel>& fixed_plain() {
  static const std::vector<FixedKernel> kernels{SIGNADAM_FIXED_PLAIN(SIGNADAM_FIXED_KERNEL)};
  return kernels;
}

}  // namespace signadam::cuda
