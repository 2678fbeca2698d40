// Every update rule once, on fp32 registers: p parameter, g gradient, m and v moments. F is float, or a vector of
// floats with the operators that compilers define for them.
//
// Where |m| <= 1 (`bounded`), m may come as L * m, with lr / L and (1 - beta1) * L for lr and 1 - beta1.
//
// The rules know nothing of lists, types or threads. Host compiler and nvcc build the same text without
// contraction, so each operation rounds once, in the order written: that is what makes backends equal bit for bit.
#pragma once

#include "scalars.h"

namespace signadam {

// sign(0) = sign(-0) = sign(NaN) = 0.
template <class F>
SIGNADAM_HD F sign(F x) {
  return (x > 0.0f ? 1.0f : 0.0f) - (x < 0.0f ? 1.0f : 0.0f);
}

// Confidence gate [SA, Alg. 3]: sign(g) where |g| > alpha, else 0. With alpha >= 0 this needs no absolute value.
template <class F>
SIGNADAM_HD F gated_sign(F g, float alpha) {
  return (g > alpha ? 1.0f : 0.0f) - (g < -alpha ? 1.0f : 0.0f);
}

// Correctly rounded on both sides: -prec-sqrt and -prec-div are nvcc's defaults, IEEE the host's.
template <class F>
SIGNADAM_HD F square_root(F x) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(x);
#else
  if constexpr (sizeof(F) == sizeof(float)) {
    return __builtin_sqrtf(x);
  } else {
    for (unsigned i = 0; i < sizeof(F) / sizeof(float); ++i) x[i] = __builtin_sqrtf(x[i]);
    return x;
  }
#endif
}

// The gradient as every rule and the confidence statistics see it. Without coupled decay p is not touched, so an
// infinite p meets no 0 * p.
template <class F>
SIGNADAM_HD F effective_gradient(const Scalars& s, F p, F g) {
  g = s.maximize ? -g : g;
  return s.coupled ? g + s.weight_decay * p : g;
}

// SIGN-SGD [BW], SSD [BH].
struct SignSGD {
  static constexpr const char* name = "sign_sgd";
  static constexpr int moments = 0;
  static constexpr bool bounded = false;
  static constexpr bool divides = false;
  template <class F>
  static SIGNADAM_HD void update(const Scalars& s, float alpha, F& p, F g, F&, F&) {
    p = p - s.lr * gated_sign(g, alpha);
  }
};

// SIGNUM [BW], M-SSD [BH, Alg. 2].
struct Signum {
  static constexpr const char* name = "signum";
  static constexpr int moments = 1;
  static constexpr bool bounded = false;
  static constexpr bool divides = false;
  template <class F>
  static SIGNADAM_HD void update(const Scalars& s, float, F& p, F g, F& m, F&) {
    m = s.beta1 * m + s.one_minus_beta1 * g;
    p = p - s.lr * sign(m);
  }
};

// signADAM [SA, Alg. 2].
struct SignAdam {
  static constexpr const char* name = "sign_adam";
  static constexpr int moments = 2;
  static constexpr bool bounded = true;
  static constexpr bool divides = true;
  template <class F>
  static SIGNADAM_HD void update(const Scalars& s, float, F& p, F g, F& m, F& v) {
    const F c = sign(g);
    m = s.beta1 * m + s.one_minus_beta1 * c;
    v = s.beta2 * v + s.one_minus_beta2 * c * c;
    p = p - s.lr * m / (square_root(v) + s.eps);
  }
};

// signADAM with the analytic second moment [SA, Sec. 4]: sqrt(1 - beta2^t) + eps is a scalar, `denominator`.
struct SignAdamAnalytic {
  static constexpr const char* name = "sign_adam_analytic";
  static constexpr int moments = 1;
  static constexpr bool bounded = true;
  static constexpr bool divides = true;
  template <class F>
  static SIGNADAM_HD void update(const Scalars& s, float, F& p, F g, F& m, F&) {
    m = s.beta1 * m + s.one_minus_beta1 * sign(g);
    p = p - s.lr * m / s.denominator;
  }
};

// signADAM++ [SA, Alg. 3].
struct SignAdamPP {
  static constexpr const char* name = "sign_adam_pp";
  static constexpr int moments = 1;
  static constexpr bool bounded = true;
  static constexpr bool divides = false;
  template <class F>
  static SIGNADAM_HD void update(const Scalars& s, float alpha, F& p, F g, F& m, F&) {
    m = s.beta1 * m + s.one_minus_beta1 * gated_sign(g, alpha);
    p = p - s.lr * m;
  }
};

// The list that backends instantiate. The order numbers the rules across the binding.
#define SIGNADAM_RULES(X) \
  X(SignSGD)              \
  X(Signum)               \
  X(SignAdam)             \
  X(SignAdamAnalytic)     \
  X(SignAdamPP)

enum RuleIndex {
#define SIGNADAM_INDEX(Rule) rule_##Rule,
  SIGNADAM_RULES(SIGNADAM_INDEX)
#undef SIGNADAM_INDEX
      rule_count
};

// The whole chain for one element: effective gradient, decoupled decay, rule. `decay` is 1 - lr * wd, and 1 where
// there is none, which changes no bit of p.
template <class Rule, class F>
SIGNADAM_HD void apply(const Scalars& s, float alpha, F& p, F g, F& m, F& v) {
  g = effective_gradient(s, p, g);
  p = p * s.decay;
  Rule::update(s, alpha, p, g, m, v);
}

}  // namespace signadam
