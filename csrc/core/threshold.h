// What moves the threshold of adaptive or steered confidence: sums over a gradient, in an order of additions that every
// backend shares: lanes add their rows in order, lanes are halved, chunk sums go through the same procedure.
#pragma once

#include "table.h"

namespace signadam {

SIGNADAM_HD bool is_finite(double x) { return x - x == 0.0; }

SIGNADAM_HD void add(Sums& to, const Sums& x) {
  to.first += x.first;
  to.second += x.second;
}

SIGNADAM_HD void add(double& to, double x) { to += x; }

// Products of two fp32 are exact in double.
SIGNADAM_HD void add(Sums& to, bool steers, float alpha, float g) {
  const double x = g;
  const double passes = g > alpha || g < -alpha ? 1.0 : 0.0;
  to.first += steers ? passes : x;
  to.second += x * x;
}

// One lane of a chunk whose elements are sums of an earlier level. Padding adds +0, which changes no sum.
template <class Sum>
SIGNADAM_HD Sum lane_of_sums(const Sum* x, int64_t count, int64_t lane) {
  Sum sum{};
  for (int64_t i = lane; i < count; i += lane_count) add(sum, x[i]);
  return sum;
}

// Lanes in which the sums of so many chunks are added: those beyond would be +0, and halving them away changes nothing.
inline int64_t lanes_for(int64_t chunks) {
  int64_t lanes = 1;
  while (lanes < chunks && lanes < lane_count) lanes *= 2;
  return lanes;
}

// a = b1 * a + (1 - b1) * std.
SIGNADAM_HD double next_deviation(double a, const Sums& sums, double n, const Scalars& s) {
  const double mean = sums.first / n;
  const double variance = sums.second / n - mean * mean;
  const double deviation = double_root(variance > 0.0 ? variance : 0.0);
  return s.confidence_beta * a + s.one_minus_confidence_beta * deviation;
}

// e^x for |x| <= 1: its series, since the libraries' exponentials differ in their last bits.
SIGNADAM_HD double exponential(double x) {
  double sum = 1.0;
  for (int k = 18; k > 0; --k) sum = 1.0 + x * sum / static_cast<double>(k);
  return sum;
}

// a *= e^(gain * (share - target)), within 2^20 of the gradient's root mean square either way: a share that cannot be
// reached, as where most entries are 0, must not carry it off. At first there is no scale: the quantile of a normal
// distribution gives one.
SIGNADAM_HD double next_threshold(double a, const Sums& sums, double n, const Scalars& s) {
  if (sums.second == 0.0) return a;
  const double size = double_root(sums.second / n);
  if (a == 0.0) return size * s.quantile;
  const double moved = a * exponential(s.gain * (sums.first / n - s.target));
  const double low = size * 0x1p-20, high = size * 0x1p+20;
  return moved < low ? low : moved > high ? high : moved;
}

// One gradient that is not finite must not close the gate for ever: what there is then stays.
SIGNADAM_HD double next_threshold_state(double a, const Sums& sums, int64_t numel, const Scalars& s) {
  if (!is_finite(sums.first) || !is_finite(sums.second)) return a;
  const double n = static_cast<double>(numel);
  return s.steers ? next_threshold(a, sums, n, s) : next_deviation(a, sums, n, s);
}

// The share of entries whose step agrees with the gradient, or the root mean square of the parameter. No share at all,
// as where the learning rate is 0, tells nothing.
SIGNADAM_HD double next_scale(double a, const Sums& sums, int64_t numel, const Scalars& s) {
  if (!is_finite(sums.first) || !is_finite(sums.second)) return a;
  const double n = static_cast<double>(numel);
  if (!s.caution) return double_root(sums.second / n);
  return sums.first == 0.0 ? a : sums.first / n;
}

// The norm of what `Rule::corrected` makes of a gradient, in place of the last one.
SIGNADAM_HD double next_norm(double a, const Sums& sums) {
  return is_finite(sums.second) ? double_root(sums.second) : a;
}

}  // namespace signadam
