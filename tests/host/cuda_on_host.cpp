// The CUDA backend without a GPU, as a library for ctypes: the kernels of csrc/block/block.h over all blocks and
// threads, in the launches that csrc/cuda/step.cu and csrc/python/bindings.cpp make of them.
#include "../../csrc/cuda/instances.h"
#include "host_block.h"

using namespace signadam;
using namespace signadam::host;

namespace {

using Launch = void (*)(const TableView&, const Step&, uint32_t, Order, uint32_t);

#if defined(SIGNADAM_FIXED)
template <Storage>
Launch launch_of(int, ThresholdPass) {
  return nullptr;
}
Launch scaled_launch_of(ThresholdPass, bool) { return nullptr; }
#else
// As kernel_for_any_rule in csrc/cuda/any_rule.cu.
Launch scaled_launch_of(ThresholdPass threshold_pass, bool observes) {
  if (threshold_pass == ThresholdPass::pass_before) return launch<AnyRule, ThresholdPass::pass_before, Storage::any>;
  return observes ? launch<AnyRule, ThresholdPass::same_pass, Storage::with_statistics>
                  : launch<AnyRule, ThresholdPass::same_pass, Storage::any>;
}

// As kernel_of in csrc/cuda/step.cu.
template <Storage storage>
Launch launch_of(int rule, ThresholdPass threshold_pass) {
  if (threshold_pass == ThresholdPass::pass_before) return launch<SignAdamPP, ThresholdPass::pass_before, storage>;
  if (threshold_pass == ThresholdPass::same_pass)
    return rule == rule_SignAdamPP ? launch<SignAdamPP, ThresholdPass::same_pass, storage> : nullptr;
  switch (rule) {
#define SIGNADAM_CASE(Rule)                                     \
  case rule_##Rule:                                             \
    if constexpr (storage == Storage::plain && has_third<Rule>) \
      return nullptr;                                           \
    else                                                        \
      return launch<Rule, ThresholdPass::none, storage>;
    SIGNADAM_HOST_RULES(SIGNADAM_CASE)
#undef SIGNADAM_CASE
    default:
      return nullptr;
  }
}
#endif

// With SIGNADAM_FIXED there are the kernels for fixed forms and no others.
#if !defined(SIGNADAM_FIXED)
#define SIGNADAM_HOST_FIXED(X)
#define SIGNADAM_HOST_SCALED(X)
#elif defined(SIGNADAM_QUICK)
#define SIGNADAM_HOST_FIXED(X)                                    \
  X(SignSGD, none, plain, fp16, fp32, fp32, nearest)              \
  X(SignAdamPP, none, plain, fp32, fp32, fp32, nearest)           \
  X(SignAdamPP, none, any, bf16, int8, fp32, stochastic)          \
  X(SignAdamPP, none, any, bf16, int4, fp32, split8)              \
  X(SignAdamPP, pass_before, plain, fp32, fp32, fp32, nearest)    \
  X(SignAdamPP, same_pass, any, bf16, int2, fp32, stochastic)     \
  X(SignAdamPP, none, with_statistics, bf16, fp32, fp32, nearest) \
  X(Signum, none, any, bf16, block8, fp32, stochastic)            \
  X(SignAdam, none, any, bf16, bf16, bf16, stochastic)
#define SIGNADAM_HOST_SCALED(X)                          \
  X(Signum, same_pass, plain, fp32, fp32, fp32, nearest) \
  X(Signum, same_pass, any, bf16, bf16, fp32, stochastic)
#else
#define SIGNADAM_HOST_FIXED(X) \
  SIGNADAM_FIXED_PLAIN(X) SIGNADAM_FIXED_STORED(X) SIGNADAM_FIXED_TWO_MOMENTS(X) SIGNADAM_FIXED_THRESHOLDS(X)
#define SIGNADAM_HOST_SCALED(X) SIGNADAM_FIXED_SCALED(X)
#endif

struct FixedLaunch {
  int rule;
  ThresholdPass threshold_pass;
  Storage storage;
  Formats formats;
  Scaling scaling;
  Launch function;
};

const std::vector<FixedLaunch> fixed_launches = {
#define SIGNADAM_ADD_OF(Functor, scaling, Rule, threshold_pass, storage, param, exp_avg, exp_avg_sq, param_storage) \
  {rule_##Rule,                                                                                                     \
   ThresholdPass::threshold_pass,                                                                                   \
   Storage::storage,                                                                                                \
   {Format::param, Format::param, Format::exp_avg, Format::exp_avg_sq, Format::fp32, ParamStorage::param_storage},  \
   Scaling::scaling,                                                                                                \
   launch<                                                                                                          \
       Functor, ThresholdPass::threshold_pass, Storage::storage,                                                    \
       FixedForms<Format::param, Format::param, Format::exp_avg, Format::exp_avg_sq, ParamStorage::param_storage>>},
#define SIGNADAM_ADD(Rule, ...) SIGNADAM_ADD_OF(Rule, none, Rule, __VA_ARGS__)
#define SIGNADAM_ADD_SCALED(Rule, ...) SIGNADAM_ADD_OF(Scaled<Rule>, steps, Rule, __VA_ARGS__)
    SIGNADAM_HOST_FIXED(SIGNADAM_ADD) SIGNADAM_HOST_SCALED(SIGNADAM_ADD_SCALED)
#undef SIGNADAM_ADD_SCALED
#undef SIGNADAM_ADD
#undef SIGNADAM_ADD_OF
};

int64_t fixed_count = 0;

// As kernel_of in csrc/cuda/step.cu.
Launch fixed_launch_of(int rule, ThresholdPass threshold_pass, Storage storage, const Formats& formats,
                       Scaling scaling) {
  const bool before = threshold_pass == ThresholdPass::pass_before;
  for (const FixedLaunch& fixed : fixed_launches)
    if (fixed.threshold_pass == threshold_pass && fixed.scaling == scaling &&
        fixed.formats == (before ? read_before(formats) : formats) &&
        (before || (fixed.rule == rule && fixed.storage == storage)))
      return fixed.function;
  return nullptr;
}

}  // namespace

extern "C" {

// How often a kernel for fixed forms has run.
int64_t fixed_launches_so_far() { return fixed_count; }

// One step of all tensors. `table`: the bytes that the CUDA backend sends to the device. `step`: the step's data with
// the places of gradients, keys, rows and scalars in it, as Table.write_step writes them. `chunk_statistics`: null, or
// where they go, of kernels for fixed forms or any rule alone. Returns 0, 1 when there is no such kernel, 2 when a
// count of arrivals was left behind, 3 when the table was not built from these headers.
int cuda_on_host(int rule, int statistics_index, int scaling_index, int64_t tensors, int64_t chunks,
                 const unsigned char* table_bytes, int64_t table_size, const unsigned char* step_bytes,
                 const int64_t* offsets, int64_t scalar_sets, ChunkStatistics* chunk_statistics, int order,
                 uint32_t seed) {
  auto threshold_pass = static_cast<ThresholdPass>(statistics_index);
  if (table_size != tensors * static_cast<int64_t>(sizeof(TensorEntry)) + chunks * 4) return 3;
  const auto* const entries = reinterpret_cast<const TensorEntry*>(table_bytes);
  // The device's memory comes uninitialised.
  const double nan = std::numeric_limits<double>::quiet_NaN();
  std::vector<Sums> sums(static_cast<std::size_t>(chunks), Sums{nan, nan});
  std::vector<uint32_t> arrivals(static_cast<std::size_t>(tensors), 0);
  TableView table{entries, reinterpret_cast<const uint32_t*>(entries + tensors), sums.data(), arrivals.data(),
                  chunk_statistics};
  std::vector<Scalars> scalars;
  const auto* const rows = reinterpret_cast<const double*>(step_bytes + offsets[3]);
  for (int64_t i = 0; i < scalar_sets; ++i) scalars.push_back(Scalars::from_set(rows + i * scalar_count));
  const bool plain = std::all_of(entries, entries + tensors, [](const TensorEntry& entry) { return entry.plain(); });
  const Step step{reinterpret_cast<const void* const*>(step_bytes + offsets[0]),
                  plain ? nullptr : reinterpret_cast<const RngKey*>(step_bytes + offsets[1]),
                  reinterpret_cast<const uint32_t*>(step_bytes + offsets[2]), scalars.data(),
                  static_cast<uint32_t>(rule)};
  const auto scaling = static_cast<Scaling>(scaling_index);

  const bool alike = tensors > 0 && std::all_of(entries, entries + tensors, [entries](const TensorEntry& entry) {
                       return entry.formats == entries->formats;
                     });
  const bool observes = chunk_statistics != nullptr;
  const auto run = [&](ThresholdPass which) {
    const Storage own = plain ? Storage::plain : Storage::any;
    const Storage storage = observes && which != ThresholdPass::pass_before ? Storage::with_statistics : own;
    const Scaling own_scaling = scaling_of(which, scaling);
    if (which == ThresholdPass::none) table.sums = nullptr;
    Launch function = alike ? fixed_launch_of(rule, which, storage, entries->formats, own_scaling) : nullptr;
    if (function != nullptr)
      ++fixed_count;
    else if (own_scaling != Scaling::none)
      function = scaled_launch_of(which, storage == Storage::with_statistics);
    else
      function = storage == Storage::with_statistics ? nullptr
                 : plain                             ? launch_of<Storage::plain>(rule, which)
                                                     : launch_of<Storage::any>(rule, which);
    if (function != nullptr) function(table, step, static_cast<uint32_t>(chunks), static_cast<Order>(order), seed);
    // Without elements there is nothing to launch.
    return function != nullptr || (which == ThresholdPass::none && chunks == 0);
  };
  if (threshold_pass == ThresholdPass::pass_before) {
    if (!run(ThresholdPass::pass_before)) return 1;
    threshold_pass = ThresholdPass::none;
  }
  if (!run(threshold_pass)) return 1;
  for (const uint32_t count : arrivals)
    if (count != 0) return 2;
  return 0;
}

// The conversions a kernel makes on loading and storing.
void widen_all(int format, int64_t count, const uint16_t* from, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = widen(static_cast<Format>(format), from[i]);
}

void narrow_all(int format, int64_t count, const float* from, uint16_t* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = narrow(static_cast<Format>(format), from[i]);
}

void narrow_stochastic_all(int format, int64_t count, const float* from, const int32_t* r, uint16_t* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = narrow(static_cast<Format>(format), from[i], static_cast<uint32_t>(r[i]));
}

void split_all(int bits, int64_t count, const float* from, const int32_t* r, uint16_t* high, int32_t* low) {
  for (int64_t i = 0; i < count; ++i) {
    const Split split = bits == 16 ? split16(from[i]) : split8(from[i], static_cast<uint32_t>(r[i]) >> 8);
    high[i] = split.high, low[i] = split.remainder;
  }
}

void join_all(int64_t count, const uint16_t* high, const int32_t* low, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = join(high[i], low[i]);
}

void block_exponent_all(int64_t count, const float* from, int32_t* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = block_exponent(finite_magnitude(from[i]));
}

void block_code_all(int64_t count, const float* from, const int32_t* e, const int32_t* r, int32_t* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = block_code(from[i], power_of_two(-e[i]), static_cast<uint32_t>(r[i]));
}

void from_block_code_all(int64_t count, const int32_t* q, const int32_t* e, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = from_block_code(q[i], power_of_two(e[i]));
}

}  // extern "C"
