// Every update rule once, on fp32 registers: p parameter, g gradient, m and v moments, x the third moment or, with
// `reads_variance`, the variance of the gradient. F is float, or a vector of floats with the operators that compilers
// define for them.
//
// Where |m| has a bound B (`bounded`), m may come as m * L / B, with lr * B / L and (1 - beta1) * L / B for lr and
// 1 - beta1.
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

// The subtraction makes +0 of both zeros.
template <class F>
SIGNADAM_HD F magnitude(F x) {
  return x > 0.0f ? x : 0.0f - x;
}

// x with its sign changed where y has a sign, that of -0 included.
template <class F>
SIGNADAM_HD F times_sign_of(F x, F y) {
  if constexpr (sizeof(F) == sizeof(float)) {
    return float_of(bits_of(x) ^ (bits_of(y) & 0x80000000u));
  } else {
    using Bits = decltype(x < y);  // integers, as many
    return reinterpret_cast<F>(reinterpret_cast<Bits>(x) ^ (reinterpret_cast<Bits>(y) & INT32_MIN));
  }
}

// Confidence gate [SA, Alg. 3]: sign(g) where |g| > alpha, else 0. With alpha >= 0 this needs no absolute value.
template <class F>
SIGNADAM_HD F gated_sign(F g, float alpha) {
  return (g > alpha ? 1.0f : 0.0f) - (g < -alpha ? 1.0f : 0.0f);
}

// size * gated_sign(g, alpha), size finite and not negative. Vectors of a processor may have a shorter way.
template <class F>
struct GatedStep {
  static SIGNADAM_HD F of(float size, F g, float alpha) { return size * gated_sign(g, alpha); }
};

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

// The gradient as every rule and the confidence statistics see it. `gradient_scale` is 1, which changes no bit, or -1
// where the objective is maximized, times what clipping and a loss scale leave. Without coupled decay p is not touched,
// so an infinite p meets no 0 * p.
template <class F>
SIGNADAM_HD F effective_gradient(const Scalars& s, F p, F g) {
  g = g * s.gradient_scale;
  return s.coupled ? g + s.weight_decay * p : g;
}

// x if it is positive, otherwise 0, also for NaN.
template <class F>
SIGNADAM_HD F positive(F x) {
  return x > 0.0f ? x : F{};
}

// NaN stays NaN.
template <class F>
SIGNADAM_HD F at_least(F x, float low) {
  return x < low ? F{} + low : x;
}

template <class F>
SIGNADAM_HD F clamped(F x, float low, float high) {
  return x > high ? F{} + high : at_least(x, low);
}

// Whatever the numerator: where nothing is known of a gradient, its parameter stays.
template <class F>
SIGNADAM_HD F zero_where_zero(F denominator, F x) {
  return denominator == 0.0f ? F{} : x;
}

// What a rule is unless it says otherwise.
struct Traits {
  static constexpr int moments = 1;
  static constexpr bool bounded = false;           // |m| has a bound, so that m may be codes without a scale
  static constexpr bool bound_by_group = false;    // and there are groups in which it has none
  static constexpr bool divides = false;           // by an element
  static constexpr bool reads_variance = false;    // of the gradient, given from outside
  static constexpr bool reads_param = false;       // for its step, which then has no meaning without p
  static constexpr bool first_is_weights = false;  // m is a copy of weights, fp32 in every group
  static constexpr bool corrects = false;          // the gradient, by `corrected`, whose norm it may clip
};

// Whether m may be codes in blocks.
template <class Rule>
constexpr bool has_blocks = Rule::moments > 0 && (!Rule::bounded || Rule::bound_by_group) && !Rule::first_is_weights;

template <class Rule>
constexpr bool has_third = Rule::moments > 2 || Rule::reads_variance;

// SIGN-SGD [BW], SSD [BH].
struct SignSGD : Traits {
  static constexpr const char* name = "sign_sgd";
  static constexpr int moments = 0;
  template <class F>
  static SIGNADAM_HD void update(const Scalars& s, float alpha, F& p, F g, F&, F&, F&) {
    p = p - GatedStep<F>::of(s.lr, g, alpha);
  }
};

// SIGNUM [BW], M-SSD [BH, Alg. 2].
struct Signum : Traits {
  static constexpr const char* name = "signum";
  template <class F>
  static SIGNADAM_HD void update(const Scalars& s, float, F& p, F g, F& m, F&, F&) {
    m = s.beta1 * m + s.one_minus_beta1 * g;
    p = p - GatedStep<F>::of(s.lr, m, 0.0f);
  }
};

// signADAM [SA, Alg. 2].
struct SignAdam : Traits {
  static constexpr const char* name = "sign_adam";
  static constexpr int moments = 2;
  static constexpr bool bounded = true;
  static constexpr bool divides = true;
  template <class F>
  static SIGNADAM_HD void update(const Scalars& s, float, F& p, F g, F& m, F& v, F&) {
    const F c = sign(g);
    m = s.beta1 * m + s.one_minus_beta1 * c;
    v = s.beta2 * v + s.one_minus_beta2 * c * c;
    p = p - s.lr * m / (square_root(v) + s.eps);
  }
};

// signADAM with the analytic second moment [SA, Sec. 4]: sqrt(1 - beta2^t) + eps is a scalar, `denominator`.
struct SignAdamAnalytic : Traits {
  static constexpr const char* name = "sign_adam_analytic";
  static constexpr bool bounded = true;
  static constexpr bool divides = true;
  template <class F>
  static SIGNADAM_HD void update(const Scalars& s, float, F& p, F g, F& m, F&, F&) {
    m = s.beta1 * m + GatedStep<F>::of(s.one_minus_beta1, g, 0.0f);
    p = p - s.lr * m / s.denominator;
  }
};

// signADAM++ [SA, Alg. 3].
struct SignAdamPP : Traits {
  static constexpr const char* name = "sign_adam_pp";
  static constexpr bool bounded = true;
  template <class F>
  static SIGNADAM_HD void update(const Scalars& s, float alpha, F& p, F g, F& m, F&, F&) {
    m = s.beta1 * m + GatedStep<F>::of(s.one_minus_beta1, g, alpha);
    p = p - s.lr * m;
  }
};

// SGD with momentum, not bias-corrected [BH, Sec. 6].
struct MSGD : Traits {
  static constexpr const char* name = "msgd";
  template <class F>
  static SIGNADAM_HD void update(const Scalars& s, float, F& p, F g, F& m, F&, F&) {
    m = s.beta1 * m + s.one_minus_beta1 * g;
    p = p - s.lr * m;
  }
};

// The moments of [BH, Eq. 9 to 11], bias-corrected: mean, and variance `s` of the gradient.
template <class F>
struct Estimate {
  F mean, variance;

  static SIGNADAM_HD Estimate of(const Scalars& s, F g, F& m, F& v) {
    m = s.beta1 * m + s.one_minus_beta1 * g;
    v = s.beta1 * v + s.one_minus_beta1 * g * g;
    const F mean = m / s.bias_correction, square = v / s.bias_correction;
    const F excess = positive(square - mean * mean);
    // With one gradient seen there is no variance; otherwise it is made unbiased, or divided by 1.
    return {mean, s.one_minus_rho == 0.0f ? F{} : excess / s.one_minus_rho};
  }
};

// [BH, Alg. 3].
struct SVAG : Traits {
  static constexpr const char* name = "svag";
  static constexpr int moments = 2;
  static constexpr bool divides = true;
  template <class F>
  static SIGNADAM_HD void update(const Scalars& s, float, F& p, F g, F& m, F& v, F&) {
    const auto e = Estimate<F>::of(s, g, m, v);
    const F square = e.mean * e.mean;
    const F denominator = square + e.variance;
    p = p - zero_where_zero(denominator, s.lr * (square / denominator) * g);
  }
};

// M-SVAG [BH, Alg. 1].
struct MSVAG : Traits {
  static constexpr const char* name = "msvag";
  static constexpr int moments = 2;
  static constexpr bool divides = true;
  template <class F>
  static SIGNADAM_HD void update(const Scalars& s, float, F& p, F g, F& m, F& v, F&) {
    const auto e = Estimate<F>::of(s, g, m, v);
    const F square = e.mean * e.mean;
    const F denominator = square + s.rho * e.variance;
    p = p - zero_where_zero(denominator, s.lr * (square / denominator) * e.mean);
  }
};

// ADAM* [BH, Alg. 4].
struct AdamStar : Traits {
  static constexpr const char* name = "adam_star";
  static constexpr int moments = 2;
  static constexpr bool divides = true;
  template <class F>
  static SIGNADAM_HD void update(const Scalars& s, float, F& p, F g, F& m, F& v, F&) {
    const auto e = Estimate<F>::of(s, g, m, v);
    const F denominator = square_root(e.mean * e.mean + s.rho * e.variance);
    p = p - zero_where_zero(denominator, s.lr * e.mean / denominator);
  }
};

// ADAM* without momentum [BH, C.3].
struct AdamStarPlain : Traits {
  static constexpr const char* name = "adam_star_plain";
  static constexpr int moments = 2;
  static constexpr bool divides = true;
  template <class F>
  static SIGNADAM_HD void update(const Scalars& s, float, F& p, F g, F& m, F& v, F&) {
    const auto e = Estimate<F>::of(s, g, m, v);
    const F denominator = square_root(e.mean * e.mean + e.variance);
    p = p - zero_where_zero(denominator, s.lr * sign(g) * magnitude(e.mean) / denominator);
  }
};

// M-SVAG with the variance of the mini-batch [BH0, Alg. 3]: v sums it, x is this step's. beta2 is beta1^2.
struct MSVAGMinibatch : Traits {
  static constexpr const char* name = "msvag_minibatch";
  static constexpr int moments = 2;
  static constexpr bool divides = true;
  static constexpr bool reads_variance = true;
  template <class F>
  static SIGNADAM_HD void update(const Scalars& s, float, F& p, F g, F& m, F& v, F& x) {
    m = s.beta1 * m + g;
    v = s.beta2 * v + x;
    const F square = m * m;
    const F denominator = square + v;
    p = p - zero_where_zero(denominator, s.lr * (square / denominator) * m);
  }
};

// ADAM* with it [BH0, Alg. 5].
struct AdamStarMinibatch : Traits {
  static constexpr const char* name = "adam_star_minibatch";
  static constexpr int moments = 2;
  static constexpr bool divides = true;
  static constexpr bool reads_variance = true;
  template <class F>
  static SIGNADAM_HD void update(const Scalars& s, float, F& p, F g, F& m, F& v, F& x) {
    m = s.beta1 * m + g;
    v = s.beta2 * v + x;
    const F denominator = square_root(m * m + v);
    p = p - zero_where_zero(denominator, s.lr * m / denominator);
  }
};

// ADAM [KB, Alg. 1]; lr comes divided by 1 - beta1^t, sqrt(1 - beta2^t) is `bias_correction`.
struct Adam : Traits {
  static constexpr const char* name = "adam";
  static constexpr int moments = 2;
  static constexpr bool divides = true;
  template <class F>
  static SIGNADAM_HD void update(const Scalars& s, float, F& p, F g, F& m, F& v, F&) {
    m = s.beta1 * m + s.one_minus_beta1 * g;
    v = s.beta2 * v + s.one_minus_beta2 * g * g;
    p = p - s.lr * m / (square_root(v) / s.bias_correction + s.eps);
  }
};

// AMSGrad, as torch.optim.Adam(amsgrad=True) has it: x is the largest v so far, or NaN after one.
struct AdamAMSGrad : Traits {
  static constexpr const char* name = "adam_amsgrad";
  static constexpr int moments = 3;
  static constexpr bool divides = true;
  template <class F>
  static SIGNADAM_HD void update(const Scalars& s, float, F& p, F g, F& m, F& v, F& x) {
    m = s.beta1 * m + s.one_minus_beta1 * g;
    v = s.beta2 * v + s.one_minus_beta2 * g * g;
    x = v > x ? v : v == v ? x : v;
    p = p - s.lr * m / (square_root(x) / s.bias_correction + s.eps);
  }
};

// Lion [LI].
struct Lion : Traits {
  static constexpr const char* name = "lion";
  template <class F>
  static SIGNADAM_HD void update(const Scalars& s, float, F& p, F g, F& m, F&, F&) {
    const F u = s.beta1 * m + s.one_minus_beta1 * g;
    p = p - GatedStep<F>::of(s.lr, u, 0.0f);
    m = s.beta2 * m + s.one_minus_beta2 * g;
  }
};

// AdamS: the root of a weighted sum of the squares of the last momentum and the gradient for Adam's denominator. BCOS
// in its simple form is this rule with other scalars.
struct AdamS : Traits {
  static constexpr const char* name = "adam_s";
  static constexpr bool divides = true;
  template <class F>
  static SIGNADAM_HD void update(const Scalars& s, float, F& p, F g, F& m, F&, F&) {
    const F square = s.beta2 * m * m + s.one_minus_beta2 * g * g;
    m = s.beta1 * m + s.one_minus_beta1 * g;
    p = p - s.lr * m / (square_root(square) + s.eps);
  }
};

// BCOS, conditional: (3 b^2 - 2 b^3) m^2 + (1 - b)^2 g^2 + 2 b (1 - b)^2 m g, written as a sum of two squares, which no
// rounding makes negative. beta2 is b^2 (2 - b^2), one_minus_beta2 is (1 - b)^2, and b is 0 at the first step.
struct BCOS : Traits {
  static constexpr const char* name = "bcos";
  static constexpr bool divides = true;
  template <class F>
  static SIGNADAM_HD void update(const Scalars& s, float, F& p, F g, F& m, F&, F&) {
    const F ahead = g + s.beta1 * m;
    const F square = s.beta2 * m * m + s.one_minus_beta2 * ahead * ahead;
    m = s.beta1 * m + s.one_minus_beta1 * g;
    p = p - s.lr * m / (square_root(square) + s.eps);
  }
};

// Lion-K: what stands in place of Lion's sign is the derivative of another convex function. `eps` is where it bends;
// with 0 each is Lion.
struct LionThreshold : Traits {
  static constexpr const char* name = "lion_threshold";
  template <class F>
  static SIGNADAM_HD void update(const Scalars& s, float, F& p, F g, F& m, F&, F&) {
    const F u = s.beta1 * m + s.one_minus_beta1 * g;
    p = p - GatedStep<F>::of(s.lr, u, s.eps);
    m = s.beta2 * m + s.one_minus_beta2 * g;
  }
};

// Huber's function: u / eps, cut off at 1. A NaN does not move p, as in Lion.
struct LionHuber : Traits {
  static constexpr const char* name = "lion_huber";
  static constexpr bool divides = true;
  template <class F>
  static SIGNADAM_HD void update(const Scalars& s, float, F& p, F g, F& m, F&, F&) {
    const F u = s.beta1 * m + s.one_minus_beta1 * g;
    p = p - s.lr * (magnitude(u) < s.eps ? u / s.eps : sign(u));
    m = s.beta2 * m + s.one_minus_beta2 * g;
  }
};

struct LionSoftsign : Traits {
  static constexpr const char* name = "lion_softsign";
  static constexpr bool divides = true;
  template <class F>
  static SIGNADAM_HD void update(const Scalars& s, float, F& p, F g, F& m, F&, F&) {
    const F u = s.beta1 * m + s.one_minus_beta1 * g;
    const F denominator = s.eps + magnitude(u);
    p = p - zero_where_zero(denominator, s.lr * (u / denominator));
    m = s.beta2 * m + s.one_minus_beta2 * g;
  }
};

// Ano: the direction is the momentum's, the size the gradient's. v falls where g^2 is smaller, as Yogi's, and decays
// beside. lr comes times sqrt(1 - beta2^t), eps times 1 - beta2^t: the bias correction of v.
struct Ano : Traits {
  static constexpr const char* name = "ano";
  static constexpr int moments = 2;
  static constexpr bool divides = true;
  template <class F>
  static SIGNADAM_HD void update(const Scalars& s, float, F& p, F g, F& m, F& v, F&) {
    const F square = g * g;
    m = s.beta1 * m + s.one_minus_beta1 * g;
    v = s.beta2 * v + GatedStep<F>::of(s.one_minus_beta2, square - v, 0.0f) * square;
    p = p - s.lr * magnitude(g) / square_root(v + s.eps) * sign(m);
  }
};

// Grams: the direction is the gradient's, the size Adam's. lr comes times sqrt(1 - beta2^t) / (1 - beta1^t).
struct Grams : Traits {
  static constexpr const char* name = "grams";
  static constexpr int moments = 2;
  static constexpr bool divides = true;
  template <class F>
  static SIGNADAM_HD void update(const Scalars& s, float, F& p, F g, F& m, F& v, F&) {
    m = s.beta1 * m + s.one_minus_beta1 * g;
    v = s.beta2 * v + s.one_minus_beta2 * g * g;
    p = p - s.lr * magnitude(m) / (square_root(v) + s.eps) * sign(g);
  }
};

// AdaMomentum: v is of the momentum, and eps is added to it at every step. lr comes as Grams has it.
struct AdaMomentum : Traits {
  static constexpr const char* name = "ada_momentum";
  static constexpr int moments = 2;
  static constexpr bool divides = true;
  template <class F>
  static SIGNADAM_HD void update(const Scalars& s, float, F& p, F g, F& m, F& v, F&) {
    m = s.beta1 * m + s.one_minus_beta1 * g;
    v = s.beta2 * v + s.one_minus_beta2 * m * m + s.eps;
    p = p - s.lr * m / square_root(v);
  }
};

// LaProp [LP, Alg. 1]: the normalized gradient is averaged. Of sqrt(v / (1 - beta2^t)) + eps the scalar factor has gone
// into `one_minus_beta1` and `eps`; lr comes divided by 1 - beta1^t. Codes have no NaN: p and v keep one. What lies
// beyond `upper` is none either, of a v that no step has made.
struct LaProp : Traits {
  static constexpr const char* name = "laprop";
  static constexpr int moments = 2;
  static constexpr bool bounded = true;
  static constexpr bool bound_by_group = true;
  static constexpr bool divides = true;
  template <class F>
  static SIGNADAM_HD void update(const Scalars& s, float, F& p, F g, F& m, F& v, F&) {
    v = s.beta2 * v + s.one_minus_beta2 * g * g;
    m = s.beta1 * m + s.one_minus_beta1 * (g / (square_root(v) + s.eps));
    p = p - s.lr * m;
    m = (m <= s.upper) & (m >= -s.upper) ? m : F{};
  }
};

// ADOPT [AD, Alg. 2]: v is that of the gradients before. At t = 1 `upper` is 0, and nothing but v is made.
struct ADOPT : Traits {
  static constexpr const char* name = "adopt";
  static constexpr int moments = 2;
  static constexpr bool divides = true;
  template <class F>
  static SIGNADAM_HD void update(const Scalars& s, float, F& p, F g, F& m, F& v, F&) {
    const F normalized = clamped(g / at_least(square_root(v), s.eps), -s.upper, s.upper);
    m = s.beta1 * m + s.one_minus_beta1 * (s.upper > 0.0f ? normalized : F{});
    v = s.beta2 * v + s.one_minus_beta2 * g * g;
    p = p - s.lr * m;
  }
};

// Adam whose learning rate of each entry is cut off at two bounds [LX, Alg. 2]; lr comes with the bias corrections of
// both moments.
struct AdaBound : Traits {
  static constexpr const char* name = "ada_bound";
  static constexpr int moments = 2;
  static constexpr bool divides = true;
  template <class F>
  static SIGNADAM_HD void update(const Scalars& s, float, F& p, F g, F& m, F& v, F&) {
    m = s.beta1 * m + s.one_minus_beta1 * g;
    v = s.beta2 * v + s.one_minus_beta2 * g * g;
    const F rate = clamped(s.lr / (square_root(v) + s.eps), s.lower, s.upper);
    p = p - rate * m;
  }
};

// The same with the largest v so far, as x, or NaN after one.
struct AMSBound : Traits {
  static constexpr const char* name = "ams_bound";
  static constexpr int moments = 3;
  static constexpr bool divides = true;
  template <class F>
  static SIGNADAM_HD void update(const Scalars& s, float, F& p, F g, F& m, F& v, F& x) {
    m = s.beta1 * m + s.one_minus_beta1 * g;
    v = s.beta2 * v + s.one_minus_beta2 * g * g;
    x = v > x ? v : v == v ? x : v;
    const F rate = clamped(s.lr / (square_root(x) + s.eps), s.lower, s.upper);
    p = p - rate * m;
  }
};

// AdEMAMix [PA, Alg. 1]: Adam with a second, slow momentum x. lr comes divided by 1 - beta1^t, sqrt(1 - beta2^t) is
// `bias_correction`, and `mix` is lr times the weight of x, which no bias is corrected of.
struct AdEMAMix : Traits {
  static constexpr const char* name = "ademamix";
  static constexpr int moments = 3;
  static constexpr bool divides = true;
  template <class F>
  static SIGNADAM_HD void update(const Scalars& s, float, F& p, F g, F& m, F& v, F& x) {
    m = s.beta1 * m + s.one_minus_beta1 * g;
    v = s.beta2 * v + s.one_minus_beta2 * g * g;
    x = s.beta3 * x + s.one_minus_beta3 * g;
    p = p - (s.lr * m + s.mix * x) / (square_root(v) / s.bias_correction + s.eps);
  }
};

// Schedule-Free [SF]: p is the point y at which gradients are taken, m the point z that steps move; their average x is
// made where it is asked for. `averaging` is the weight c of z in x, `one_minus_beta1` is 1 - beta1 * (1 - c),
// `shrinking` what decoupled decay takes of y. Two small numbers meet before the large one, whose rounding is then the
// only one.
template <class F>
SIGNADAM_HD void move_both(const Scalars& s, F step, F& y, F& z) {
  step = step + s.shrinking * y;
  y = y + (s.averaging * (z - y) - s.one_minus_beta1 * step);
  z = z - step;
}

// With Adam's second moment; sqrt(1 - beta2^t) has gone into lr and `eps`.
struct ScheduleFreeAdamW : Traits {
  static constexpr const char* name = "schedule_free_adamw";
  static constexpr int moments = 2;
  static constexpr bool divides = true;
  static constexpr bool reads_param = true;
  static constexpr bool first_is_weights = true;
  template <class F>
  static SIGNADAM_HD void update(const Scalars& s, float, F& p, F g, F& m, F& v, F&) {
    v = s.beta2 * v + s.one_minus_beta2 * g * g;
    move_both(s, s.lr * g / (square_root(v) + s.eps), p, m);
  }
};

// With the gated sign.
struct ScheduleFreeSign : Traits {
  static constexpr const char* name = "schedule_free_sign";
  static constexpr bool reads_param = true;
  static constexpr bool first_is_weights = true;
  template <class F>
  static SIGNADAM_HD void update(const Scalars& s, float alpha, F& p, F g, F& m, F&, F&) {
    move_both(s, GatedStep<F>::of(s.lr, g, alpha), p, m);
  }
};

// MARS-AdamW [MA, Alg. 2]: Adam of the gradient corrected by its difference to the last one, x. `correction` is gamma *
// beta1 / (1 - beta1). alpha is the norm of the whole tensor's corrected gradient over the largest allowed, or 0. lr
// and `eps` as in LaProp, beside which lr is divided by 1 - beta1^t.
struct MARSAdamW : Traits {
  static constexpr const char* name = "mars_adamw";
  static constexpr int moments = 3;
  static constexpr bool divides = true;
  static constexpr bool corrects = true;
  template <class F>
  static SIGNADAM_HD F corrected(const Scalars& s, F g, F x) {
    return g + s.correction * (g - x);
  }
  template <class F>
  static SIGNADAM_HD void update(const Scalars& s, float alpha, F& p, F g, F& m, F& v, F& x) {
    const F c = corrected(s, g, x) * (alpha > 1.0f ? 1.0f / alpha : 1.0f);
    m = s.beta1 * m + s.one_minus_beta1 * c;
    v = s.beta2 * v + s.one_minus_beta2 * c * c;
    p = p - s.lr * m / (square_root(v) + s.eps);
    x = g;
  }
};

// FOCUS [FO, Alg. 1]: m is the average of the weights, bias-corrected as it is kept, v the momentum. `averaging` is the
// weight of p in m, `mix` is lr times gamma, `shrinking` what decoupled decay takes of the average. Where p is all of
// the average, as at the first step, m + (p - m) would round by what was there before.
struct FOCUS : Traits {
  static constexpr const char* name = "focus";
  static constexpr int moments = 2;
  static constexpr bool reads_param = true;
  static constexpr bool first_is_weights = true;
  template <class F>
  static SIGNADAM_HD void update(const Scalars& s, float, F& p, F g, F& m, F& v, F&) {
    v = s.beta1 * v + s.one_minus_beta1 * g;
    m = s.averaging == 1.0f ? p : m + s.averaging * (p - m);
    p = p - (GatedStep<F>::of(s.lr, v, 0.0f) + GatedStep<F>::of(s.mix, p - m, 0.0f) + s.shrinking * m);
  }
};

// The list that backends instantiate. The order numbers the rules across the binding.
#define SIGNADAM_RULES(X) \
  X(SignSGD)              \
  X(Signum)               \
  X(SignAdam)             \
  X(SignAdamAnalytic)     \
  X(SignAdamPP)           \
  X(MSGD)                 \
  X(SVAG)                 \
  X(MSVAG)                \
  X(AdamStar)             \
  X(AdamStarPlain)        \
  X(MSVAGMinibatch)       \
  X(AdamStarMinibatch)    \
  X(Adam)                 \
  X(AdamAMSGrad)          \
  X(Lion)                 \
  X(AdamS)                \
  X(BCOS)                 \
  X(LionThreshold)        \
  X(LionHuber)            \
  X(LionSoftsign)         \
  X(Ano)                  \
  X(Grams)                \
  X(AdaMomentum)          \
  X(LaProp)               \
  X(ADOPT)                \
  X(AdaBound)             \
  X(AMSBound)             \
  X(AdEMAMix)             \
  X(ScheduleFreeAdamW)    \
  X(ScheduleFreeSign)     \
  X(MARSAdamW)            \
  X(FOCUS)

enum RuleIndex {
#define SIGNADAM_INDEX(Rule) rule_##Rule,
  SIGNADAM_RULES(SIGNADAM_INDEX)
#undef SIGNADAM_INDEX
      rule_count
};

// Decoupled decay and the rule, given the effective gradient. `decay` is 1 - lr * wd, and 1 where there is none, which
// changes no bit of p.
template <class Rule, class F>
SIGNADAM_HD void apply_plainly(const Scalars& s, float alpha, F& p, F g, F& m, F& v, F& x) {
  p = p * s.decay;
  Rule::update(s, alpha, p, g, m, v, x);
}

// Cautious weight decay [CW, Alg. 1]: p decays unless the step leads it away from 0. Where the step is 0 p decays, and
// where it is NaN it does not. Signs, because the product of a small p and a small step is 0; that of p = 0 does not
// matter. Rules subtract, so that what is asked for its sign is what they computed, and the step is never made.
template <class F>
SIGNADAM_HD F cautiously_decayed(const Scalars& s, F p, F step) {
  return times_sign_of(-step, p) >= 0.0f ? p * s.decay : p;
}

// What a rule moves by its step alone: -0. A number that is added to it stays as it is, and one that is subtracted
// changes its sign alone, zeros too.
template <class F>
SIGNADAM_HD F unmoved() {
  return -F{};
}

// The same with it. Rules read p only to move it, so there they leave the step.
template <class Rule, class F>
SIGNADAM_HD void apply_cautiously(const Scalars& s, float alpha, F& p, F g, F& m, F& v, F& x) {
  F step = unmoved<F>();
  Rule::update(s, alpha, step, g, m, v, x);
  p = cautiously_decayed(s, p, step) + step;
}

// Whether a step goes against the gradient, as it should: 1 or 0. Against a NaN none does, whatever its sign bit, which
// processors leave as they like.
template <class F>
SIGNADAM_HD F agreement(F step, F g) {
  return (times_sign_of(step, g) < 0.0f) & ((g < 0.0f) | (g > 0.0f)) ? F{} + 1.0f : F{};
}

// The same with the step multiplied by a number of the tensor's, `scale`, and with caution [CO] only where it goes
// against the gradient. NaN stays NaN. Returns the step before that.
template <class Rule, class F>
SIGNADAM_HD F apply_scaled(const Scalars& s, float scale, F& p, F g, F& m, F& v, F& x) {
  F step = unmoved<F>();
  Rule::update(s, s.alpha, step, g, m, v, x);
  const F whole = step;
  if (s.caution) step = (agreement(step, g) > 0.0f) | (step != step) ? step : F{};
  step = step * scale;
  p = (s.cautious_decay ? cautiously_decayed(s, p, step) : p * s.decay) + step;
  return whole;
}

// The first or the second, which is the same for all elements of a tensor.
template <class Rule, class F>
SIGNADAM_HD void apply_effective(const Scalars& s, float alpha, F& p, F g, F& m, F& v, F& x) {
  if (s.cautious_decay)
    apply_cautiously<Rule>(s, alpha, p, g, m, v, x);
  else
    apply_plainly<Rule>(s, alpha, p, g, m, v, x);
}

// The whole chain for one element.
template <class Rule, class F>
SIGNADAM_HD void apply(const Scalars& s, float alpha, F& p, F g, F& m, F& v, F& x) {
  apply_effective<Rule>(s, alpha, p, effective_gradient(s, p, g), m, v, x);
}

}  // namespace signadam
