// The hyperparameters of one parameter group at one step, as the kernels take them.
#pragma once

#include "platform.h"

namespace signadam {

// Every scalar crosses the binding as a double, unrounded, in this order; Python packs a row by these names.
#define SIGNADAM_SCALARS(X) \
  X(lr)                     \
  X(weight_decay)           \
  X(decay)                  \
  X(coupled)                \
  X(maximize)               \
  X(alpha)                  \
  X(beta1)                  \
  X(one_minus_beta1)        \
  X(beta2)                  \
  X(one_minus_beta2)        \
  X(eps)                    \
  X(denominator)            \
  X(confidence_beta)        \
  X(one_minus_confidence_beta)

enum ScalarIndex {
#define SIGNADAM_INDEX(name) index_##name,
  SIGNADAM_SCALARS(SIGNADAM_INDEX)
#undef SIGNADAM_INDEX
      scalar_count
};

struct Scalars {
  // Statistics and the adaptive threshold are double arithmetic; everything else meets tensors in fp32.
  double adaptive_alpha, confidence_beta, one_minus_confidence_beta;
  float lr, weight_decay, decay, alpha, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, denominator;
  uint32_t coupled, maximize;

  static Scalars from_row(const double* row) {
    auto f = [row](ScalarIndex i) { return static_cast<float>(row[i]); };
    Scalars s{};
    s.adaptive_alpha = row[index_alpha];
    s.confidence_beta = row[index_confidence_beta];
    s.one_minus_confidence_beta = row[index_one_minus_confidence_beta];
    s.lr = f(index_lr);
    s.weight_decay = f(index_weight_decay);
    s.decay = f(index_decay);
    s.alpha = f(index_alpha);
    s.beta1 = f(index_beta1);
    s.one_minus_beta1 = f(index_one_minus_beta1);
    s.beta2 = f(index_beta2);
    s.one_minus_beta2 = f(index_one_minus_beta2);
    s.eps = f(index_eps);
    s.denominator = f(index_denominator);
    s.coupled = row[index_coupled] != 0;
    s.maximize = row[index_maximize] != 0;
    return s;
  }
};

}  // namespace signadam
