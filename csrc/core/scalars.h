// The hyperparameters of one parameter group at one step, as the kernels take them.
#pragma once

#include "platform.h"

namespace signadam {

// Every scalar crosses the binding as a double, unrounded, in this order; Python packs a set by these names. Most meet
// tensors, and are rounded to fp32 for it.
#define SIGNADAM_FLOATS(X) \
  X(gradient_scale)        \
  X(lr)                    \
  X(weight_decay)          \
  X(decay)                 \
  X(alpha)                 \
  X(beta1)                 \
  X(one_minus_beta1)       \
  X(beta2)                 \
  X(one_minus_beta2)       \
  X(beta3)                 \
  X(one_minus_beta3)       \
  X(mix)                   \
  X(eps)                   \
  X(denominator)           \
  X(bias_correction)       \
  X(rho)                   \
  X(one_minus_rho)         \
  X(lower)                 \
  X(upper)

// What moves the threshold of adaptive or steered confidence is arithmetic of doubles.
#define SIGNADAM_DOUBLES(X)    \
  X(confidence_beta)           \
  X(one_minus_confidence_beta) \
  X(target)                    \
  X(gain)                      \
  X(quantile)

#define SIGNADAM_FLAGS(X) \
  X(coupled)              \
  X(cautious_decay)       \
  X(scales)               \
  X(caution)              \
  X(steers)

#define SIGNADAM_SCALARS(X) \
  SIGNADAM_FLOATS(X)        \
  SIGNADAM_DOUBLES(X)       \
  SIGNADAM_FLAGS(X)

enum ScalarIndex {
#define SIGNADAM_INDEX(name) index_##name,
  SIGNADAM_SCALARS(SIGNADAM_INDEX)
#undef SIGNADAM_INDEX
      scalar_count
};

struct Scalars {
  double adaptive_alpha;  // alpha before it is rounded
#define SIGNADAM_FIELD(name) double name;
  SIGNADAM_DOUBLES(SIGNADAM_FIELD)
#undef SIGNADAM_FIELD
#define SIGNADAM_FIELD(name) float name;
  SIGNADAM_FLOATS(SIGNADAM_FIELD)
#undef SIGNADAM_FIELD
#define SIGNADAM_FIELD(name) uint32_t name;
  SIGNADAM_FLAGS(SIGNADAM_FIELD)
#undef SIGNADAM_FIELD

  // `set[index]`: the unrounded ones.
  template <class Set>
  SIGNADAM_HD static Scalars from_set(const Set& set) {
    Scalars s{};
    s.adaptive_alpha = set[index_alpha];
#define SIGNADAM_SET(name) s.name = set[index_##name];
    SIGNADAM_DOUBLES(SIGNADAM_SET)
#undef SIGNADAM_SET
#define SIGNADAM_SET(name) s.name = static_cast<float>(set[index_##name]);
    SIGNADAM_FLOATS(SIGNADAM_SET)
#undef SIGNADAM_SET
#define SIGNADAM_SET(name) s.name = set[index_##name] != 0;
    SIGNADAM_FLAGS(SIGNADAM_SET)
#undef SIGNADAM_SET
    return s;
  }
};

}  // namespace signadam
