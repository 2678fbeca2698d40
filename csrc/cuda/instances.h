// The combinations of dtypes and storage forms that have a kernel of their own: those that people use. All others, and
// rules that are new, are served by the general kernels of step.cu.
//
// X(rule, threshold pass, storage, dtype of parameter and gradient, exp_avg, exp_avg_sq, the parameter's storage): what
// a rule does not have is fp32. At most 80 in all: each is compiled for every architecture.
#pragma once

// fp32 moments, and parameters rounded to nearest.
#define SIGNADAM_FIXED_PLAIN(X)                         \
  X(SignAdamPP, none, plain, fp32, fp32, fp32, nearest) \
  X(SignAdamPP, none, plain, bf16, fp32, fp32, nearest) \
  X(SignAdamPP, none, plain, fp16, fp32, fp32, nearest) \
  X(SignSGD, none, plain, fp32, fp32, fp32, nearest)    \
  X(SignSGD, none, plain, bf16, fp32, fp32, nearest)    \
  X(SignSGD, none, plain, fp16, fp32, fp32, nearest)    \
  X(Signum, none, plain, fp32, fp32, fp32, nearest)     \
  X(Signum, none, plain, bf16, fp32, fp32, nearest)     \
  X(Lion, none, plain, fp32, fp32, fp32, nearest)       \
  X(Lion, none, plain, bf16, fp32, fp32, nearest)       \
  X(Lion, none, plain, fp16, fp32, fp32, nearest)       \
  X(MSGD, none, plain, fp32, fp32, fp32, nearest)       \
  X(MSGD, none, plain, bf16, fp32, fp32, nearest)       \
  X(SignAdam, none, plain, fp32, fp32, fp32, nearest)   \
  X(SignAdam, none, plain, bf16, fp32, fp32, nearest)   \
  X(Adam, none, plain, fp32, fp32, fp32, nearest)       \
  X(Adam, none, plain, bf16, fp32, fp32, nearest)       \
  X(AdamS, none, plain, fp32, fp32, fp32, nearest)      \
  X(BCOS, none, plain, fp32, fp32, fp32, nearest)       \
  X(LaProp, none, plain, fp32, fp32, fp32, nearest)     \
  X(ADOPT, none, plain, fp32, fp32, fp32, nearest)

// Other storage forms of rules with one moment or none.
#define SIGNADAM_FIXED_STORED(X)                         \
  X(SignAdamPP, none, any, fp32, bf16, fp32, nearest)    \
  X(SignAdamPP, none, any, fp32, int8, fp32, nearest)    \
  X(SignAdamPP, none, any, fp32, int4, fp32, nearest)    \
  X(SignAdamPP, none, any, fp32, int2, fp32, nearest)    \
  X(SignAdamPP, none, any, bf16, bf16, fp32, nearest)    \
  X(SignAdamPP, none, any, bf16, int8, fp32, nearest)    \
  X(SignAdamPP, none, any, bf16, fp32, fp32, stochastic) \
  X(SignAdamPP, none, any, bf16, bf16, fp32, stochastic) \
  X(SignAdamPP, none, any, bf16, int8, fp32, stochastic) \
  X(SignAdamPP, none, any, bf16, int4, fp32, stochastic) \
  X(SignAdamPP, none, any, bf16, int2, fp32, stochastic) \
  X(SignAdamPP, none, any, bf16, int8, fp32, split16)    \
  X(SignAdamPP, none, any, bf16, int4, fp32, split16)    \
  X(SignAdamPP, none, any, bf16, int2, fp32, split16)    \
  X(SignAdamPP, none, any, bf16, int8, fp32, split8)     \
  X(SignAdamPP, none, any, bf16, int4, fp32, split8)     \
  X(SignAdamPP, none, any, bf16, int2, fp32, split8)     \
  X(SignAdamPP, none, any, bf16, int8, fp32, master)     \
  X(SignSGD, none, any, bf16, fp32, fp32, stochastic)    \
  X(SignSGD, none, any, bf16, fp32, fp32, split16)       \
  X(Signum, none, any, fp32, block8, fp32, nearest)      \
  X(Signum, none, any, bf16, bf16, fp32, stochastic)     \
  X(Signum, none, any, bf16, block8, fp32, stochastic)   \
  X(Lion, none, any, bf16, bf16, fp32, stochastic)       \
  X(Lion, none, any, bf16, block8, fp32, stochastic)     \
  X(Lion, none, any, bf16, block8, fp32, split8)         \
  X(AdamS, none, any, bf16, bf16, fp32, stochastic)      \
  X(BCOS, none, any, bf16, bf16, fp32, stochastic)

// Other storage forms of rules with two moments.
#define SIGNADAM_FIXED_TWO_MOMENTS(X)                  \
  X(SignAdam, none, any, bf16, bf16, bf16, stochastic) \
  X(SignAdam, none, any, bf16, int8, bf16, stochastic) \
  X(SignAdam, none, any, bf16, int4, bf16, split8)     \
  X(Adam, none, any, fp32, bf16, bf16, nearest)        \
  X(Adam, none, any, fp32, block8, bf16, nearest)      \
  X(Adam, none, any, bf16, bf16, bf16, stochastic)     \
  X(Adam, none, any, bf16, block8, bf16, stochastic)   \
  X(Adam, none, any, bf16, bf16, bf16, split16)        \
  X(LaProp, none, any, bf16, int8, bf16, stochastic)   \
  X(ADOPT, none, any, bf16, block8, bf16, stochastic)

// With a threshold that is made of sums over the gradient, or with the statistics of the step.
#define SIGNADAM_FIXED_THRESHOLDS(X)                                 \
  X(SignAdamPP, pass_before, plain, fp32, fp32, fp32, nearest)       \
  X(SignAdamPP, pass_before, plain, bf16, fp32, fp32, nearest)       \
  X(SignAdamPP, same_pass, plain, fp32, fp32, fp32, nearest)         \
  X(SignAdamPP, same_pass, plain, bf16, fp32, fp32, nearest)         \
  X(SignAdamPP, same_pass, any, bf16, bf16, fp32, stochastic)        \
  X(SignAdamPP, same_pass, any, bf16, int8, fp32, stochastic)        \
  X(SignAdamPP, same_pass, any, bf16, int4, fp32, stochastic)        \
  X(SignAdamPP, same_pass, any, bf16, int2, fp32, stochastic)        \
  X(SignAdamPP, none, with_statistics, fp32, fp32, fp32, nearest)    \
  X(SignAdamPP, none, with_statistics, bf16, fp32, fp32, nearest)    \
  X(SignAdamPP, none, with_statistics, bf16, bf16, fp32, stochastic) \
  X(SignAdamPP, none, with_statistics, bf16, int8, fp32, stochastic) \
  X(SignAdamPP, none, with_statistics, bf16, int4, fp32, stochastic) \
  X(SignAdamPP, none, with_statistics, bf16, int2, fp32, stochastic) \
  X(SignSGD, none, with_statistics, fp32, fp32, fp32, nearest)       \
  X(Adam, none, with_statistics, fp32, fp32, fp32, nearest)

// With steps that are multiplied by a number of the tensor's, of one launch: caution by the last step's share, "rms".
#define SIGNADAM_FIXED_SCALED(X)                          \
  X(Signum, same_pass, plain, fp32, fp32, fp32, nearest)  \
  X(Signum, same_pass, any, bf16, fp32, fp32, stochastic) \
  X(Signum, same_pass, any, bf16, bf16, fp32, stochastic) \
  X(Lion, same_pass, plain, fp32, fp32, fp32, nearest)    \
  X(Adam, same_pass, plain, fp32, fp32, fp32, nearest)
