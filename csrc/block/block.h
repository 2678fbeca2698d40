// What one block of 256 threads does with one chunk. Written against a `Block` that runs a phase on all threads and
// waits for them, so the very text that a GPU executes also runs on the host, thread by thread, under sanitizers.
#pragma once

#include <type_traits>

#include "../core/rules.h"
#include "any_rule.h"
#include "forms.h"
#include "operand.h"
#include "scaled.h"
#include "stored.h"
#include "sums.h"

namespace signadam {

// Pieces whose loads a thread issues before it uses the first: as many as stay in 128 registers beside the arithmetic.
// One piece of four operands is 128 bytes under way, 64 KB per multiprocessor with two blocks.
template <class Rule, ThresholdPass threshold_pass>
constexpr int pieces_in_flight =
    Rule::moments > 1 || Rule::divides || threshold_pass == ThresholdPass::same_pass ? 1 : 2;

// The same of full chunks, whose pieces they divide. A gradient that is only summed takes few registers.
template <class Rule, ThresholdPass threshold_pass, Storage storage>
constexpr int pieces_in_flight_of_full = threshold_pass == ThresholdPass::pass_before ? 4
                                         : storage == Storage::with_statistics ? 1
                                                                               : pieces_in_flight<Rule, threshold_pass>;

// Of a piece. What is uniform over the chunk is asked once, not for each element.
SIGNADAM_HD void scale_gradient(const Scalars& s, float* g) {
  if (s.gradient_scale == 1.0f) return;
  SIGNADAM_UNROLL
  for (int i = 0; i < piece_size; ++i) g[i] = g[i] * s.gradient_scale;
}

SIGNADAM_HD void make_effective(const Scalars& s, const float* p, float* g) {
  scale_gradient(s, g);
  if (s.coupled) {
    SIGNADAM_UNROLL
    for (int i = 0; i < piece_size; ++i) g[i] = g[i] + s.weight_decay * p[i];
  }
}

// As `observed_threshold`, of rules whose threshold may be in no other's place.
template <class Rule>
SIGNADAM_HD float threshold_seen(const Scalars& s, float alpha) {
  return Rule::corrects ? observed_threshold(s, alpha) : alpha;
}

// The elements of a piece in registers: summed into the thread's lanes, updated, or both. `is_effective`: whether the
// gradient is what `make_effective` leaves; otherwise each element's is made where it is used, in fewer registers.
template <class Rule, ThresholdPass threshold_pass, bool is_effective>
SIGNADAM_HD void update_piece(const Scalars& s, float alpha, const Piece& piece, float* p, const float* g, float* m,
                              float* v, float* x, Sums* lanes) {
  const auto effective = [&](int i) { return is_effective ? g[i] : effective_gradient(s, p[i], g[i]); };
  if constexpr (threshold_pass != ThresholdPass::none) {
    const auto sum = [&](bool steers) {
      SIGNADAM_UNROLL
      for (int i = 0; i < piece_size; ++i) {
        const int k = i - piece.offset;
        if (k >= 0 && k < piece.count) add(lanes[i], steers, alpha, effective(i));
      }
    };
    if (s.steers)
      sum(true);
    else
      sum(false);
  }
  if constexpr (threshold_pass != ThresholdPass::pass_before) {
    // One jump for the piece.
    if (s.cautious_decay) {
      SIGNADAM_UNROLL
      for (int i = 0; i < piece_size; ++i) apply_cautiously<Rule>(s, alpha, p[i], effective(i), m[i], v[i], x[i]);
    } else {
      SIGNADAM_UNROLL
      for (int i = 0; i < piece_size; ++i) apply_plainly<Rule>(s, alpha, p[i], effective(i), m[i], v[i], x[i]);
    }
  }
}

// The same of a rule that is scaled, which updates and sums. What is summed is asked once, not for each element.
template <class Rule, bool is_effective>
SIGNADAM_HD void update_piece_scaled(const Scalars& s, float scale, const Piece& piece, float* p, const float* g,
                                     float* m, float* v, float* x, double* lanes) {
  const auto each = [&](Scalars own, bool caution) {
    own.caution = caution;
    SIGNADAM_UNROLL
    for (int i = 0; i < piece_size; ++i) {
      const float before = p[i], effective = is_effective ? g[i] : effective_gradient(s, p[i], g[i]);
      const float step = apply_scaled<typename Rule::Unscaled>(own, scale, p[i], effective, m[i], v[i], x[i]);
      const int k = i - piece.offset;
      if (k >= 0 && k < piece.count) lanes[i] += share_of_entry(own, before, step, effective);
    }
  };
  if (s.caution)
    each(s, true);
  else
    each(s, false);
}

// All pieces of one thread. `lanes` are the thread's 8 lanes of the statistics.
template <class Rule, ThresholdPass threshold_pass>
SIGNADAM_HD void run_thread_plain(const Slice& slice, const Scalars& s, float alpha, int thread, Sums* lanes) {
  constexpr bool updates = threshold_pass != ThresholdPass::pass_before;
  constexpr int moments = updates ? Rule::moments : 0;
  // With a momentum in any dtype two would spill on sm_80 and sm_90.
  constexpr int in_flight = moments > 0 ? 1 : pieces_in_flight<Rule, threshold_pass>;

  const int head = slice.tensor.head;
  const int pieces = pieces_of(slice.count, head);
  const bool reads_param = updates || s.coupled;
  const Operand param = Operand::of(slice.tensor.param, slice.tensor.formats.param, slice);
  const Operand grad = Operand::of(slice.grad, slice.tensor.formats.grad, slice);
  const Operand exp_avg = Operand::of(slice.tensor.exp_avg, Format::fp32, slice);
  const Operand exp_avg_sq = Operand::of(slice.tensor.exp_avg_sq, Format::fp32, slice);

  // Two rounds of the loop at once would not fit the registers.
  SIGNADAM_ROLLED
  for (int index = thread; index < pieces; index += in_flight * threads_per_block) {
    Raw raw_p[in_flight], raw_g[in_flight], raw_m[in_flight], raw_v[in_flight];
    SIGNADAM_UNROLL
    for (int u = 0; u < in_flight; ++u) {
      const Piece piece = piece_of(index + u * threads_per_block, slice.count, head);
      if (piece.count == 0) continue;
      raw_g[u] = grad.load(piece);
      if (reads_param) raw_p[u] = param.load(piece);
      if constexpr (moments > 0) raw_m[u] = exp_avg.load(piece);
      if constexpr (moments > 1) raw_v[u] = exp_avg_sq.load(piece);
    }
    SIGNADAM_UNROLL
    for (int u = 0; u < in_flight; ++u) {
      // Computed again: two pieces kept in registers would spill.
      const Piece piece = piece_of(index + u * threads_per_block, slice.count, head);
      if (piece.count == 0) continue;
      float p[piece_size] = {}, g[piece_size], m[piece_size], v[piece_size], none[piece_size];
      grad.unpack(raw_g[u], g);
      if (reads_param) param.unpack(raw_p[u], p);
      if constexpr (moments > 0) exp_avg.unpack(raw_m[u], m);
      if constexpr (moments > 1) exp_avg_sq.unpack(raw_v[u], v);
      update_piece<Rule, threshold_pass, false>(s, alpha, piece, p, g, m, v, none, lanes);
      if constexpr (updates) param.store(piece, p);
      if constexpr (moments > 0) exp_avg.store(piece, m);
      if constexpr (moments > 1) exp_avg_sq.store(piece, v);
    }
  }
}

// A piece as its loads bring it.
struct StoredRaw {
  Raw grad;
  ParamRaw param;
  Raw exp_avg, exp_avg_sq, exp_third;
};

// The operands of a slice in any storage form. Forms are uniform over the chunk, so branches on them do not diverge.
template <class Rule, ThresholdPass threshold_pass, Storage storage, ChunkKind kind>
struct StoredSlice : StoredOperands {
  static constexpr bool updates = threshold_pass != ThresholdPass::pass_before;
  static constexpr bool sums = threshold_pass != ThresholdPass::none;
  static constexpr int moments = updates ? Rule::moments : 0;
  static constexpr bool aux = updates && has_third<Rule>;
  static constexpr bool observes = updates && storage == Storage::with_statistics;

  const Slice& slice;
  bool reads_param;

  SIGNADAM_HD static StoredSlice of(const Slice& slice, const Scalars& s) {
    StoredSlice found{StoredOperands::of(slice), slice, updates || (kind == ChunkKind::any && s.coupled)};
    if constexpr (kind != ChunkKind::any) {
      found.param.aligned = found.param.param.aligned = true;
      found.exp_avg.wide.at.aligned = found.exp_avg_sq.at.aligned = true;
      found.grad.aligned = kind == ChunkKind::full;
    }
    return found;
  }

  SIGNADAM_HD Piece piece(int index) const { return piece_of<kind>(index, slice); }

  SIGNADAM_HD StoredRaw load(int index) const {
    const Piece piece = this->piece(index);
    StoredRaw raw;
    raw.grad = grad.load(piece);
    if (reads_param) raw.param = param.load(piece);
    if constexpr (moments > 0) raw.exp_avg = exp_avg.load(piece, index);
    if constexpr (moments > 1) raw.exp_avg_sq = exp_avg_sq.load(piece);
    if constexpr (aux) raw.exp_third = exp_third.load(piece);
    return raw;
  }

  // `keep_m(m, r)` stores the new m or keeps it for later, with the random bits for it.
  template <class KeepM>
  SIGNADAM_HD void update(const Scalars& s, float alpha, int index, LaneSum<Rule>* lanes, ChunkStatistics* own,
                          KeepM keep_m) const {
    // Random bits are drawn before the loads and the parameter is stored before m, but beside the sums later and after
    // it: an order in which 128 registers suffice on every architecture.
    RandomHalves r{};
    if constexpr (updates && !sums) r = rng_keys.at<kind>(piece(index));
    const StoredRaw raw = load(index);
    update_loaded(s, alpha, index, raw, r, lanes, own, keep_m);
  }

  template <class KeepM>
  SIGNADAM_HD void update_loaded(const Scalars& s, float alpha, int index, const StoredRaw& raw, RandomHalves r,
                                 LaneSum<Rule>* lanes, ChunkStatistics* own, KeepM keep_m) const {
    const Piece piece = this->piece(index);
    float p[piece_size] = {}, g[piece_size], m[piece_size], v[piece_size], x[piece_size];
    grad.unpack(raw.grad, g);
    if (reads_param) param.unpack(raw.param, p);
    if constexpr (moments > 0) exp_avg.unpack(raw.exp_avg, m);
    if constexpr (moments > 1) exp_avg_sq.unpack(raw.exp_avg_sq, v);
    if constexpr (aux) exp_third.unpack(raw.exp_third, x);
    constexpr bool is_effective = kind != ChunkKind::any || observes;
    if constexpr (is_effective && updates) make_effective(s, p, g);
    if constexpr (is_effective && !updates) scale_gradient(s, g);  // of full chunks, where decay is not coupled
    Observer<(moments > 0)> observer;
    if constexpr (observes) observer.before(threshold_seen<Rule>(s, alpha), piece, g, m, own);
    if constexpr (is_scaled<Rule>)
      update_piece_scaled<Rule, is_effective>(s, alpha, piece, p, g, m, v, x, lanes);
    else
      update_piece<Rule, threshold_pass, is_effective>(s, alpha, piece, p, g, m, v, x, lanes);
    if constexpr (observes) observer.after(piece, m, own);
    if constexpr (updates) {
      if constexpr (sums) r = rng_keys.at<kind>(piece);
      if constexpr (moments > 0 && sums) keep_m(m, r);
      param.store(piece, p, r);
      if constexpr (moments > 0 && !sums) keep_m(m, r);
      if constexpr (moments > 1) exp_avg_sq.store(piece, v, [&](int i) { return r.for_m(i) ^ 0xffffu; });
      if constexpr (moments > 2) exp_third.store(piece, x, [&](int i) { return bits_for_aux(r.of(i)); });
    }
  }
};

template <class Rule, ThresholdPass threshold_pass, Storage storage, ChunkKind kind>
SIGNADAM_HD void run_thread_stored(const Slice& slice, const Scalars& s, float alpha, int thread, LaneSum<Rule>* lanes,
                                   ChunkStatistics* own) {
  using Stored = StoredSlice<Rule, threshold_pass, storage, kind>;
  const auto stored = Stored::of(slice, s);
  const auto keep_m = [&](int index) {
    return [&stored, index](const float* m, const RandomHalves& r) {
      stored.exp_avg.store(stored.piece(index), index, m, [&](int i) { return r.for_m(i); });
    };
  };
  if constexpr (kind == ChunkKind::any) {
    const int pieces = pieces_of(slice.count, slice.tensor.head);
    SIGNADAM_ROLLED
    for (int index = thread; index < pieces; index += threads_per_block) {
      if (stored.piece(index).count == 0) continue;
      stored.update(s, alpha, index, lanes, own, keep_m(index));
    }
  } else {
    constexpr int in_flight = pieces_in_flight_of_full<Rule, threshold_pass, storage>;
    static_assert(row_count % in_flight == 0);
    SIGNADAM_ROLLED
    for (int row = 0; row < row_count; row += in_flight) {
      const int first = row * threads_per_block + thread;
      StoredRaw raw[in_flight];
      SIGNADAM_UNROLL
      for (int u = 0; u < in_flight; ++u) raw[u] = stored.load(first + u * threads_per_block);
      SIGNADAM_UNROLL
      for (int u = 0; u < in_flight; ++u) {
        const int index = first + u * threads_per_block;
        RandomHalves r{};
        if constexpr (Stored::updates && !Stored::sums) r = stored.rng_keys.template at<kind>(stored.piece(index));
        stored.update_loaded(s, alpha, index, raw[u], r, lanes, own, keep_m(index));
      }
    }
  }
}

// Block-scaled moments: four neighbouring threads have the pieces of one exponent.
template <class Rule, Storage storage, ChunkKind kind, class Block>
SIGNADAM_HD void run_block_of_codes(Block& block, const Slice& slice, const Scalars& s, float alpha,
                                    ChunkStatistics* shares) {
  const auto stored = StoredSlice<Rule, ThresholdPass::none, storage, kind>::of(slice, s);
  const int pieces = kind == ChunkKind::any ? pieces_of(slice.count, 0) : static_cast<int>(chunk_size) / piece_size;
  if constexpr (storage == Storage::with_statistics)
    block.each([=](int thread) { shares[thread] = ChunkStatistics{}; });
  SIGNADAM_ROLLED
  for (int first = 0; first < pieces; first += threads_per_block)
    block.template in_fours<PendingMoment>(
        [&](int thread, PendingMoment& pending) {
          uint32_t largest = 0;
          if (kind == ChunkKind::any && first + thread >= pieces) return largest;
          ChunkStatistics own{};
          stored.update(s, alpha, first + thread, nullptr, &own,
                        [&](const float* m, const RandomHalves& r) { largest = pending.keep(m, r); });
          if constexpr (storage == Storage::with_statistics) add(shares[thread], own);
          return largest;
        },
        [&](int thread, const PendingMoment& pending, uint32_t largest) {
          if (kind != ChunkKind::any || first + thread < pieces)
            stored.exp_avg.store_scaled(first + thread, pending.m, pending.r, largest);
        });
}

template <class Rule, ThresholdPass threshold_pass, Storage storage, class Forms, ChunkKind kind>
SIGNADAM_HD void run_thread(const Slice& slice, const Scalars& s, float alpha, int thread, LaneSum<Rule>* lanes,
                            ChunkStatistics* own) {
  if constexpr (storage == Storage::plain && !Forms::fixed)
    run_thread_plain<Rule, threshold_pass>(slice, s, alpha, thread, lanes);
  else
    run_thread_stored<Rule, threshold_pass, storage, kind>(slice, s, alpha, thread, lanes, own);
}

// Which kind the chunk is. Nothing depends on a thread.
template <class Rule, ThresholdPass threshold_pass>
SIGNADAM_HD ChunkKind kind_of(const Slice& slice, const Scalars& s) {
  const auto place = [](const void* address) { return reinterpret_cast<uintptr_t>(address); };
  const TensorEntry& tensor = slice.tensor;
  // Chunks are as aligned as the tensor they are of.
  uintptr_t others = 0;
  bool usual = slice.count == chunk_size;
  if constexpr (threshold_pass == ThresholdPass::pass_before) {
    usual = usual && !s.coupled && tensor.head == 0;
  } else {
    others |= place(tensor.param) | place(tensor.residual);
    if constexpr (Rule::moments > 0) others |= place(tensor.exp_avg);
    if constexpr (Rule::moments > 1) others |= place(tensor.exp_avg_sq);
    if (!tensor.formats.plain()) usual = usual && PieceBits::of(slice).even();
  }
  return !usual || others % 16 != 0    ? ChunkKind::any
         : place(slice.grad) % 16 == 0 ? ChunkKind::full
                                       : ChunkKind::full_but_gradient;
}

// The update of one chunk, without statistics for the gate.
template <class Rule, Storage storage, class Forms, ChunkKind kind, class Block>
SIGNADAM_HD void update_chunk(Block& block, const Slice& slice, const Scalars& s, float alpha,
                              ChunkStatistics* shares) {
  if constexpr (storage != Storage::plain && has_blocks<Rule>)
    if (slice.tensor.formats.exp_avg == Format::block8)
      return run_block_of_codes<Rule, storage, kind>(block, slice, s, alpha, shares);
  block.each([&](int thread) {
    ChunkStatistics own{};
    run_thread<Rule, ThresholdPass::none, storage, Forms, kind>(slice, s, alpha, thread, nullptr, &own);
    if constexpr (storage == Storage::with_statistics) shares[thread] = own;
  });
}

// The sums of one chunk's gradient, in the block's lanes, and its update.
template <class Rule, ThresholdPass threshold_pass, Storage storage, class Forms, ChunkKind kind, class Block>
SIGNADAM_HD void sum_chunk(Block& block, const Slice& slice, const Scalars& s, float alpha, ChunkStatistics* shares) {
  Sums* const lanes = block.lanes();
  block.each([&](int thread) {
    LaneSum<Rule> own[piece_size] = {};
    ChunkStatistics statistics{};
    run_thread<Rule, threshold_pass, storage, Forms, kind>(slice, s, alpha, thread, own, &statistics);
    if constexpr (storage == Storage::with_statistics) shares[thread] = statistics;
    SIGNADAM_UNROLL
    for (int i = 0; i < piece_size; ++i) {
      if constexpr (is_scaled<Rule>)
        lanes[place_of(lane_of(thread, i))] = as_sums(s, own[i]);
      else
        lanes[place_of(lane_of(thread, i))] = own[i];
    }
  });
}

template <class Rule, ThresholdPass threshold_pass, Storage storage, class Forms, ChunkKind kind, class Block>
SIGNADAM_HD void run_chunk(Block& block, const Slice& slice, const Scalars& s, float alpha, ChunkStatistics* shares) {
  if constexpr (threshold_pass == ThresholdPass::none)
    update_chunk<Rule, storage, Forms, kind>(block, slice, s, alpha, shares);
  else
    sum_chunk<Rule, threshold_pass, storage, Forms, kind>(block, slice, s, alpha, shares);
}

// What a tensor has of its own in this step: its threshold, or what multiplies its steps.
template <class Rule, ThresholdPass threshold_pass>
SIGNADAM_HD float threshold_or_scale(const TensorEntry& tensor, const Scalars& s) {
  if constexpr (is_scaled<Rule>) return update_scale(*tensor.threshold_state, s);
  return threshold_pass == ThresholdPass::pass_before ? 0.0f : threshold(tensor, s);
}

template <class Rule, ThresholdPass threshold_pass, Storage storage, class Forms, class Block>
SIGNADAM_HD void run_block_of_rule(Block& block, const TableView& table, const Step& step, uint32_t chunk) {
  Slice slice = slice_of(table, step, chunk);
  if (slice.grad == nullptr) return;
  Forms::fix(slice.tensor.formats);
  const uint32_t index = table.tensor_of_chunk[chunk];
  const Scalars& kept = step.scalars[step.scalar_indices[index]];
  // Where they lie, scalars are read again after every store; in registers there is room for them in a kernel for fixed
  // forms only.
  std::conditional_t<Forms::fixed, const Scalars, const Scalars&> s = kept;
  const float number = threshold_or_scale<Rule, threshold_pass>(slice.tensor, s);

  ChunkStatistics* shares = nullptr;
  if constexpr (storage == Storage::with_statistics) shares = block.chunk_statistics();
  if constexpr (Forms::fixed) {
    const ChunkKind kind = kind_of<Rule, threshold_pass>(slice, s);
    if (kind == ChunkKind::full)
      run_chunk<Rule, threshold_pass, storage, Forms, ChunkKind::full>(block, slice, s, number, shares);
    else if (kind == ChunkKind::full_but_gradient)
      run_chunk<Rule, threshold_pass, storage, Forms, ChunkKind::full_but_gradient>(block, slice, s, number, shares);
    else
      run_chunk<Rule, threshold_pass, storage, Forms, ChunkKind::any>(block, slice, s, number, shares);
  } else {
    run_chunk<Rule, threshold_pass, storage, Forms, ChunkKind::any>(block, slice, s, number, shares);
  }
  if constexpr (threshold_pass != ThresholdPass::none) {
    halve(block, block.lanes());
    block.alone([&] { table.sums[chunk] = sum_of_halved(block.lanes()); });
  }
  if constexpr (storage == Storage::with_statistics)
    finish_chunk_statistics(block, shares, threshold_seen<Rule>(s, number), table.chunk_statistics + chunk);
  if constexpr (threshold_pass != ThresholdPass::none) {
    // The last block of a tensor to finish has every other's threshold read behind it, so it may move the gate.
    // Read again: kept in registers over the update, it would be spilled.
    const TensorEntry& tensor = table.tensors[index];
    if (block.arrives_last(table.arrivals + index, static_cast<uint32_t>(chunks_of(tensor.numel))))
      finish_statistics(block, table, tensor, [&](double state, const Sums& sums) {
        return is_scaled<Rule> ? next_scale(state, sums, tensor.numel, kept)
                               : next_threshold_state(state, sums, tensor.numel, kept);
      });
  }
}

template <class Rule, ThresholdPass threshold_pass, Storage storage, class Forms, class Block>
SIGNADAM_HD void run_block(Block& block, const TableView& table, const Step& step, uint32_t chunk) {
  if constexpr (std::is_same_v<Rule, AnyRule>)
    run_block_of_any_rule<threshold_pass, storage>(block, table, step, chunk);
  else
    run_block_of_rule<Rule, threshold_pass, storage, Forms>(block, table, step, chunk);
}

}  // namespace signadam
