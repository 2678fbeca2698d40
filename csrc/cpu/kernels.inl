// Included by one source file per instruction set, which defines SIGNADAM_ISA and is compiled with its flags. Only
// code of this namespace may be instantiated here: an inline function of the standard library compiled for AVX-512
// could be the copy that the linker keeps for everyone.
#include "kernels.h"

#if defined(__F16C__)
// GCC's own header leaves the lanes that AVX-512's unmasked forms do not use undefined, and warns of it.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace signadam::cpu::SIGNADAM_ISA {
namespace {

// Elements that 16-bit operands are widened by at a time: scratch that stays in the first-level cache.
constexpr int block_size = 1024;

void widen_block(Format format, const uint16_t* SIGNADAM_RESTRICT from, float* SIGNADAM_RESTRICT to, int count) {
  int i = 0;
  if (format == Format::bf16) {
    for (; i < count; ++i) to[i] = widen_bf16(from[i]);
    return;
  }
#if defined(__F16C__)
  for (; i + 8 <= count; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
#endif
  for (; i < count; ++i) to[i] = widen_fp16(from[i]);
}

void narrow_block(Format format, const float* SIGNADAM_RESTRICT from, uint16_t* SIGNADAM_RESTRICT to, int count) {
  int i = 0;
  if (format == Format::bf16) {
    for (; i < count; ++i) to[i] = narrow_bf16(from[i]);
    return;
  }
#if defined(__F16C__)
  for (; i + 8 <= count; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
#endif
  for (; i < count; ++i) to[i] = narrow_fp16(from[i]);
}

// What a rule reads and updates at the same place of a chunk, in fp32; null where it has none.
struct Arrays {
  float* p;
  const float* g;
  float *m, *v, *x;

  Arrays from(int i) const {
    const auto moved = [i](auto* array) { return array == nullptr ? nullptr : array + i; };
    return {moved(p), moved(g), moved(m), moved(v), moved(x)};
  }
};

template <class Rule>
SIGNADAM_HD void update_block(const Scalars& s, float alpha, const Arrays& arrays, int count) {
  float* SIGNADAM_RESTRICT const p = arrays.p;
  const float* SIGNADAM_RESTRICT const g = arrays.g;
  float* SIGNADAM_RESTRICT const m = arrays.m;
  float* SIGNADAM_RESTRICT const v = arrays.v;
  float* SIGNADAM_RESTRICT const x = arrays.x;
  const auto each = [&](auto apply) {
    for (int i = 0; i < count; ++i) {
      float m_i = 0.0f, v_i = 0.0f, x_i = 0.0f;
      if constexpr (Rule::moments > 0) m_i = m[i];
      if constexpr (Rule::moments > 1) v_i = v[i];
      if constexpr (has_third<Rule>) x_i = x[i];
      apply(p[i], effective_gradient(s, p[i], g[i]), m_i, v_i, x_i);
      if constexpr (Rule::moments > 0) m[i] = m_i;
      if constexpr (Rule::moments > 1) v[i] = v_i;
      if constexpr (Rule::moments > 2) x[i] = x_i;
    }
  };
  // A loop without a branch in it each, of which compilers make vectors.
  if (s.scales)
    each([&](float& p_i, float g_i, float& m_i, float& v_i, float& x_i) {
      apply_scaled<Rule>(s, alpha, p_i, g_i, m_i, v_i, x_i);
    });
  else if (s.cautious_decay)
    each([&](float& p_i, float g_i, float& m_i, float& v_i, float& x_i) {
      apply_cautiously<Rule>(s, alpha, p_i, g_i, m_i, v_i, x_i);
    });
  else
    each([&](float& p_i, float g_i, float& m_i, float& v_i, float& x_i) {
      apply_plainly<Rule>(s, alpha, p_i, g_i, m_i, v_i, x_i);
    });
}

const void* at(const void* base, Format format, int64_t index) {
  return static_cast<const unsigned char*>(base) + bytes_before(format, index);
}

// fp32 is used where it lies; a 16-bit operand goes through scratch.
const float* widened(const void* base, Format format, int64_t index, float* scratch, int count) {
  const void* from = at(base, format, index);
  if (format == Format::fp32) return static_cast<const float*>(from);
  widen_block(format, static_cast<const uint16_t*>(from), scratch, count);
  return scratch;
}

// Sums of every 16th element, of the statistics of a block.
constexpr int observed_lanes = 16;
struct ObservedLanes {
  double passed[observed_lanes], squares[observed_lanes], passed_squares[observed_lanes], flips[observed_lanes],
      magnitudes[observed_lanes];
};

void add_lanes(const ObservedLanes& lanes, ChunkStatistics& to) {
  for (int lane = 0; lane < observed_lanes; ++lane)
    add(to, ChunkStatistics{lanes.passed[lane], lanes.squares[lane], lanes.passed_squares[lane], lanes.flips[lane],
                            lanes.magnitudes[lane], 0.0});
}

#include "stored.inl"
#if defined(__AVX2__)
// Each uses what comes before it.

#include "fused.inl"

#include "pairs.inl"

#include "doubles.inl"
#endif

// The statistics of a block: the gradient as the gate sees it, and the momentum before and after the step. Sums of
// every 16th element are independent, so that compilers make vectors of them.
void observe_block(const float* SIGNADAM_RESTRICT g, float alpha, const float* SIGNADAM_RESTRICT before,
                   const float* SIGNADAM_RESTRICT after, int count, ChunkStatistics& to) {
  ObservedLanes lanes{};
  const auto observe = [&](int i, int lane) {
    ChunkStatistics one{};
    observe_gradient(one, g[i], alpha);
    if (after != nullptr) observe_momentum(one, before[i], after[i]);
    lanes.passed[lane] += one.passed;
    lanes.squares[lane] += one.squares;
    lanes.passed_squares[lane] += one.passed_squares;
    lanes.flips[lane] += one.flips;
    lanes.magnitudes[lane] += one.magnitude;
  };
  int i = 0;
#if defined(__AVX2__)
  i = observe_rows(g, alpha, before, after, count, lanes);
#endif
  for (; i + observed_lanes <= count; i += observed_lanes)
    for (int lane = 0; lane < observed_lanes; ++lane) observe(i + lane, lane);
  for (; i < count; ++i) observe(i, 0);
  add_lanes(lanes, to);
}

// Elements of a full chunk that are updated in one half before the other has its turn.
constexpr int turn = 64;

// fp32 throughout: nothing to convert.
template <class Rule>
SIGNADAM_APART void update_fp32(const Slice& slice, const Scalars& scalars, float alpha) {
  const Scalars s = scalars;  // a local copy cannot alias the tensors
  const TensorEntry& tensor = slice.tensor;
  const auto array = [&](void* base, bool used) { return used ? static_cast<float*>(base) + slice.begin : nullptr; };
  const Arrays arrays{array(tensor.param, true), static_cast<const float*>(slice.grad) + slice.begin,
                      array(tensor.exp_avg, Rule::moments > 0), array(tensor.exp_avg_sq, Rule::moments > 1),
                      array(tensor.aux, has_third<Rule>)};
  if (slice.count < chunk_size || has_third<Rule>) return update_block<Rule>(s, alpha, arrays, slice.count);
  // The halves of the chunk in turn: twice the streams keep more of the memory's parallelism busy. Five operands are
  // streams enough.
  constexpr int half = chunk_size / 2;
  for (int i = 0; i < half; i += turn)
    for (int at = i; at < chunk_size; at += half) update_block<Rule>(s, alpha, arrays.from(at), turn);
}

// Any forms, a block at a time by way of scratch, from element `done` of the chunk on: the start of a packed run.
template <class Rule>
SIGNADAM_APART void update_blocks(const Slice& slice, const Scalars& scalars, float alpha, int done,
                                  ChunkStatistics* chunk_statistics) {
  const Scalars s = scalars;  // a local copy cannot alias the tensors
  const TensorEntry& tensor = slice.tensor;
  const Formats& formats = tensor.formats;
  alignas(64) float scratch_p[block_size], scratch_g[block_size], scratch_m[block_size], scratch_v[block_size],
      scratch_x[block_size];
  Halves halves;
  const uint16_t* r = nullptr;
  for (; done < slice.count; done += block_size) {
    const int64_t index = slice.begin + done;
    const int count = slice.count - done < block_size ? slice.count - done : block_size;
    const auto load = [&](void* base, Format format, float* scratch, bool used) {
      return used ? load_moment(base, format, tensor.numel, index, scratch, count) : nullptr;
    };
    Arrays arrays;
    arrays.g = widened(slice.grad, formats.grad, index, scratch_g, count);
    arrays.p = load_param(tensor, index, scratch_p, count);
    arrays.m = load(tensor.exp_avg, formats.exp_avg, scratch_m, Rule::moments > 0);
    arrays.v = load(tensor.exp_avg_sq, formats.exp_avg_sq, scratch_v, Rule::moments > 1);
    arrays.x = load(tensor.aux, formats.aux, scratch_x, has_third<Rule>);
    alignas(64) float scratch_effective[block_size], before[block_size];
    const float* effective = arrays.g;
    if (chunk_statistics != nullptr) {
      if (s.coupled || s.gradient_scale != 1.0f) {
        for (int i = 0; i < count; ++i) scratch_effective[i] = effective_gradient(s, arrays.p[i], arrays.g[i]);
        effective = scratch_effective;
      }
      if (Rule::moments > 0) std::memcpy(before, arrays.m, sizeof(float) * static_cast<std::size_t>(count));
    }
    update_block<Rule>(s, alpha, arrays, count);
    if (chunk_statistics != nullptr)
      observe_block(effective, observed_threshold(s, alpha), before, arrays.m, count, *chunk_statistics);
    if (!formats.plain()) r = draw(slice.rng_keys, tensor, index, count, halves);
    store_param(tensor, index, arrays.p, r, count);
    if constexpr (Rule::moments > 0)
      store_moment<0>(tensor.exp_avg, formats.exp_avg, tensor.numel, index, arrays.m, r, count);
    if constexpr (Rule::moments > 1)
      store_moment<1>(tensor.exp_avg_sq, formats.exp_avg_sq, tensor.numel, index, arrays.v, r, count);
    if constexpr (Rule::moments > 2) store_moment<2>(tensor.aux, formats.aux, tensor.numel, index, arrays.x, r, count);
  }
}

template <class Rule>
void update_chunk(const Slice& slice, const Scalars& s, float alpha, ChunkStatistics* chunk_statistics) {
  if (chunk_statistics != nullptr) {
    *chunk_statistics = ChunkStatistics{0.0, 0.0, 0.0, 0.0, 0.0, observed_threshold(s, alpha)};
    int done = 0;
#if defined(__AVX2__)
    // A division takes as long as memory does.
    if constexpr (Rule::moments < 2 && !has_third<Rule> && !Rule::divides)
      if (!s.scales) done = update_observed<Rule>(slice, s, alpha, *chunk_statistics);
#endif
    return update_blocks<Rule>(slice, s, alpha, done, chunk_statistics);
  }
  const Formats& formats = slice.tensor.formats;
  if (!s.scales && formats.plain() && formats.param == Format::fp32 && formats.grad == Format::fp32)
    return update_fp32<Rule>(slice, s, alpha);
  int done = 0;
#if defined(__AVX2__)
  if constexpr (!has_third<Rule>) {
    if (s.scales) return update_blocks<Rule>(slice, s, alpha, 0, nullptr);
    done = update_pairs<Rule>(slice, s, alpha);
    if (done == 0) done = update_groups<Rule>(slice, s, alpha);
  }
#endif
  update_blocks<Rule>(slice, s, alpha, done, nullptr);
}

// x[:h] + x[h:] for h = size / 2, ..., 2, 1.
double halve(double* SIGNADAM_RESTRICT lanes, int size) {
  for (int h = size / 2; h >= 1; h /= 2) {
    const double* SIGNADAM_RESTRICT upper = lanes + h;
    for (int i = 0; i < h; ++i) lanes[i] += upper[i];
  }
  return lanes[0];
}

// Lanes that are summed together: their sums stay in registers over all rows of the chunk.
constexpr int lanes_together = 32;

Sums sum_chunk(const Slice& slice, const Scalars& scalars, float alpha) {
  const Scalars s = scalars;
  const TensorEntry& tensor = slice.tensor;
  const Format grad_format = tensor.formats.grad;
  alignas(64) double first[lane_count], second[lane_count];
#if defined(__AVX2__)
  if (sum_lanes(slice, s, alpha, first, second)) return {halve(first, lane_count), halve(second, lane_count)};
#endif
  // Lanes that no element reaches are +0, and halving them away changes nothing.
  int lanes = lanes_together;
  while (lanes < lane_count && lanes < slice.count) lanes *= 2;
  for (int begin = 0; begin < lanes; begin += lanes_together) {
    double a[lanes_together] = {}, b[lanes_together] = {};
    alignas(64) float scratch_p[lanes_together], scratch_g[lanes_together];
    for (int place = begin; place < slice.count; place += lane_count) {
      const int64_t index = slice.begin + place;
      const int left = slice.count - place;
      const auto sum = [&](int count) {
        const float* g = widened(slice.grad, grad_format, index, scratch_g, count);
        const float* p = s.coupled ? load_param(tensor, index, scratch_p, count) : g;
        for (int i = 0; i < count; ++i) {
          Sums one{0.0, 0.0};
          add(one, s.steers != 0, alpha, effective_gradient(s, p[i], g[i]));
          a[i] += one.first;
          b[i] += one.second;
        }
      };
      if (left >= lanes_together)
        sum(lanes_together);  // a count the compiler knows
      else
        sum(left);
    }
    for (int i = 0; i < lanes_together; ++i) first[begin + i] = a[i], second[begin + i] = b[i];
  }
  return {halve(first, lanes), halve(second, lanes)};
}

template <class Rule>
Sums sum_step(const Slice& slice, const Scalars& scalars) {
  const Scalars s = scalars;
  const TensorEntry& tensor = slice.tensor;
  const Formats& formats = tensor.formats;
  alignas(64) double first[lane_count] = {}, second[lane_count] = {};
  alignas(64) float scratch_p[block_size], scratch_g[block_size], scratch_m[block_size], scratch_v[block_size],
      scratch_x[block_size];
  for (int done = 0; done < slice.count; done += block_size) {
    const int64_t index = slice.begin + done;
    const int count = slice.count - done < block_size ? slice.count - done : block_size;
    const float* const p = load_param(tensor, index, scratch_p, count);
    double* const counts = first + done % lane_count;
    double* const squares = second + done % lane_count;
    if (s.clips) {
      if constexpr (Rule::corrects) {
        const float* const g = widened(slice.grad, formats.grad, index, scratch_g, count);
        const float* const x = load_moment(tensor.aux, formats.aux, tensor.numel, index, scratch_x, count);
        for (int i = 0; i < count; ++i) {
          const double c = Rule::corrected(s, effective_gradient(s, p[i], g[i]), x[i]);
          squares[i] += c * c;
        }
      }
      continue;
    }
    if (!s.caution) {
      for (int i = 0; i < count; ++i) squares[i] += static_cast<double>(p[i]) * static_cast<double>(p[i]);
      continue;
    }
    const auto load = [&](void* base, Format format, float* scratch, bool used) {
      return used ? load_moment(base, format, tensor.numel, index, scratch, count) : nullptr;
    };
    const float* const g = widened(slice.grad, formats.grad, index, scratch_g, count);
    const float* const m = load(tensor.exp_avg, formats.exp_avg, scratch_m, Rule::moments > 0);
    const float* const v = load(tensor.exp_avg_sq, formats.exp_avg_sq, scratch_v, Rule::moments > 1);
    const float* const x = load(tensor.aux, formats.aux, scratch_x, has_third<Rule>);
    for (int i = 0; i < count; ++i) {
      float step = 0.0f, m_i = 0.0f, v_i = 0.0f, x_i = 0.0f;
      if constexpr (Rule::moments > 0) m_i = m[i];
      if constexpr (Rule::moments > 1) v_i = v[i];
      if constexpr (has_third<Rule>) x_i = x[i];
      const float effective = effective_gradient(s, p[i], g[i]);
      Rule::update(s, s.alpha, step, effective, m_i, v_i, x_i);
      counts[i] += static_cast<double>(agreement(step, effective));
    }
  }
  return {halve(first, lane_count), halve(second, lane_count)};
}

#include "vote.inl"

}  // namespace
}  // namespace signadam::cpu::SIGNADAM_ISA

namespace signadam::cpu {

#define SIGNADAM_CASTS(memory) \
  {SIGNADAM_ISA::cast_chunk<VoteMemory::memory, false>, SIGNADAM_ISA::cast_chunk<VoteMemory::memory, true>}
const Kernels SIGNADAM_ISA_TABLE = {SIGNADAM_ISA_NAME,
                                    {
#define SIGNADAM_ENTRY(Rule) SIGNADAM_ISA::update_chunk<Rule>,
                                        SIGNADAM_RULES(SIGNADAM_ENTRY)
#undef SIGNADAM_ENTRY
                                    },
                                    SIGNADAM_ISA::sum_chunk,
                                    {
#define SIGNADAM_ENTRY(Rule) SIGNADAM_ISA::sum_step<Rule>,
                                        SIGNADAM_RULES(SIGNADAM_ENTRY)
#undef SIGNADAM_ENTRY
                                    },
                                    {SIGNADAM_CASTS(none), SIGNADAM_CASTS(gradients), SIGNADAM_CASTS(gated_signs)},
                                    SIGNADAM_ISA::count_words<2, true>,
                                    {SIGNADAM_ISA::count_words<2, false>, SIGNADAM_ISA::count_words<4, false>,
                                     SIGNADAM_ISA::count_words<8, false>, SIGNADAM_ISA::count_words<16, false>},
                                    {SIGNADAM_ISA::read_chunk<2>, SIGNADAM_ISA::read_chunk<4>,
                                     SIGNADAM_ISA::read_chunk<8>, SIGNADAM_ISA::read_chunk<16>}};

}  // namespace signadam::cpu
