// The standard deviation of a gradient in an order of additions that every backend shares (ALGORITHMS, adaptive
// confidence): lanes add their rows in order, lanes are halved, chunk sums go through the same procedure.
#pragma once

#include "table.h"

namespace signadam {

SIGNADAM_HD double double_root(double x) {
#if defined(__CUDA_ARCH__)
  return __dsqrt_rn(x);
#else
  return __builtin_sqrt(x);
#endif
}

SIGNADAM_HD bool is_finite(double x) { return x - x == 0.0; }

SIGNADAM_HD void add(Sums& to, const Sums& x) {
  to.first += x.first;
  to.second += x.second;
}

// Products of two fp32 are exact in double.
SIGNADAM_HD void add(Sums& to, float g) {
  const double x = g;
  to.first += x;
  to.second += x * x;
}

// One lane of a chunk whose elements are sums of an earlier level. Padding adds +0, which changes no sum.
SIGNADAM_HD Sums lane_of_sums(const Sums* x, int64_t count, int64_t lane) {
  Sums sum{0.0, 0.0};
  for (int64_t i = lane; i < count; i += lane_count) add(sum, x[i]);
  return sum;
}

// a = b1 * a + (1 - b1) * std. One gradient that is not finite must not close the gate for ever: `a` then stays.
SIGNADAM_HD double next_deviation(double a, const Sums& sums, int64_t numel, const Scalars& s) {
  if (!is_finite(sums.first) || !is_finite(sums.second)) return a;
  const double n = static_cast<double>(numel);
  const double mean = sums.first / n;
  const double variance = sums.second / n - mean * mean;
  const double deviation = double_root(variance > 0.0 ? variance : 0.0);
  return s.confidence_beta * a + s.one_minus_confidence_beta * deviation;
}

}  // namespace signadam
