// What one block does with one chunk where steps are multiplied by a number of the tensor's: caution [CO],
// `lr_scale="rms"`; and the norm of a corrected gradient [MA]. One text for every rule and form, chosen when it runs: a
// kernel for each rule would double the module. A few rules and forms have one, see scaled.h.
#pragma once

#include "../core/rules.h"
#include "forms.h"
#include "scaled.h"
#include "stored.h"
#include "sums.h"

namespace signadam {

// Stands for the rule that a step names.
struct AnyRule : Traits {
  static constexpr int moments = 3;
};

template <class Use>
SIGNADAM_HD void with_rule(uint32_t rule, Use use) {
  switch (rule) {
#define SIGNADAM_CASE(Rule) \
  case rule_##Rule:         \
    return use(Rule{});
    SIGNADAM_RULES(SIGNADAM_CASE)
#undef SIGNADAM_CASE
    default:
      return;
  }
}

// A piece in registers. What the rule does not have is 0.
struct PieceOfAnyRule {
  float p[piece_size] = {}, g[piece_size] = {}, m[piece_size] = {}, v[piece_size] = {}, x[piece_size] = {};
};

// What a chunk of any rule is made of.
struct SliceOfAnyRule : StoredOperands {
  const Slice& slice;
  int moments = 0;

  SIGNADAM_HD static SliceOfAnyRule of(const Slice& slice, uint32_t rule) {
    SliceOfAnyRule found{StoredOperands::of(slice), slice};
    with_rule(rule, [&](auto own) { found.moments = decltype(own)::moments; });
    return found;
  }

  SIGNADAM_HD bool in_blocks() const { return slice.tensor.formats.exp_avg == Format::block8; }

  SIGNADAM_HD PieceOfAnyRule load(const Scalars& s, const Piece& piece, int index, bool updates) const {
    PieceOfAnyRule found;
    grad.unpack(grad.load(piece), found.g);
    if (updates || s.coupled || !(s.caution || s.clips)) param.unpack(param.load(piece), found.p);
    // A norm is made of the gradient and the last one.
    if (updates || s.caution) {
      if (moments > 0) exp_avg.unpack(exp_avg.load(piece, index), found.m);
      if (moments > 1) exp_avg_sq.unpack(exp_avg_sq.load(piece), found.v);
    }
    if (slice.tensor.aux != nullptr) exp_third.unpack(exp_third.load(piece), found.x);
    SIGNADAM_UNROLL
    for (int i = 0; i < piece_size; ++i) found.g[i] = effective_gradient(s, found.p[i], found.g[i]);
    return found;
  }

  // All but codes in blocks, which four neighbouring threads make together.
  SIGNADAM_HD void store(const Piece& piece, int index, const PieceOfAnyRule& from, const RandomHalves& r) const {
    param.store(piece, from.p, r);
    if (moments > 0 && !in_blocks()) exp_avg.store(piece, index, from.m, [&](int i) { return r.for_m(i); });
    if (moments > 1) exp_avg_sq.store(piece, from.v, [&](int i) { return r.for_m(i) ^ 0xffffu; });
    if (moments > 2) exp_third.store(piece, from.x, [&](int i) { return bits_for_aux(r.of(i)); });
  }
};

// The sums alone, of a step that is not taken yet.
template <class Rule>
SIGNADAM_HD Sums share_before(const Scalars& s, float p, float g, float m, float v, float x) {
  if constexpr (Rule::corrects) {
    if (s.clips) {
      const double c = Rule::corrected(s, g, x);
      return {0.0, c * c};
    }
  }
  float step = 0.0f;
  Rule::update(s, s.alpha, step, g, m, v, x);
  return as_sums(s, share_of_entry(s, p, step, g));
}

// One piece: summed, updated, or both. `lanes` are the thread's in the block's. Returns the bits of the largest
// magnitude of codes in blocks, which are left in `pending`.
template <ThresholdPass threshold_pass, Storage storage>
SIGNADAM_HD uint32_t run_piece_of_any_rule(const SliceOfAnyRule& stored, const Step& step, const Scalars& s,
                                           float scale, int index, Sums* lanes, int thread, ChunkStatistics* shares,
                                           PendingMoment& pending) {
  constexpr bool updates = threshold_pass != ThresholdPass::pass_before;
  constexpr bool observes = storage == Storage::with_statistics;
  const Piece piece = piece_of(index, stored.slice.count, stored.slice.tensor.head);
  PieceOfAnyRule own = stored.load(s, piece, index, updates);
  const auto add_share = [&](int i, const Sums& share) {
    const int k = i - piece.offset;
    if (lanes != nullptr && k >= 0 && k < piece.count) add(lanes[place_of(lane_of(thread, i))], share);
  };
  Observer<true> observer;
  ChunkStatistics statistics{};
  if constexpr (observes) observer.before(s.alpha, piece, own.g, own.m, &statistics);
  with_rule(step.rule, [&](auto rule) {
    using Rule = decltype(rule);
    SIGNADAM_UNROLL
    for (int i = 0; i < piece_size; ++i) {
      if constexpr (updates) {
        const float before = own.p[i];
        const float whole = apply_scaled<Rule>(s, scale, own.p[i], own.g[i], own.m[i], own.v[i], own.x[i]);
        add_share(i, as_sums(s, share_of_entry(s, before, whole, own.g[i])));
      } else {
        add_share(i, share_before<Rule>(s, own.p[i], own.g[i], own.m[i], own.v[i], own.x[i]));
      }
    }
  });
  if constexpr (observes) {
    observer.after(piece, own.m, &statistics);
    add(shares[thread], statistics);
  }
  uint32_t largest = 0;
  if constexpr (updates) {
    RandomHalves r{};
    if (step.rng_keys != nullptr) r = stored.rng_keys.at(piece);
    stored.store(piece, index, own, r);
    if (stored.in_blocks()) largest = pending.keep(own.m, r);
  }
  return largest;
}

// Where `table.sums` is null there is no sum to take: the number is known.
template <ThresholdPass threshold_pass, Storage storage, class Block>
SIGNADAM_HD void run_block_of_any_rule(Block& block, const TableView& table, const Step& step, uint32_t chunk) {
  const Slice slice = slice_of(table, step, chunk);
  if (slice.grad == nullptr) return;
  const uint32_t index = table.tensor_of_chunk[chunk];
  const Scalars& s = step.scalars[step.scalar_indices[index]];
  const TensorEntry& tensor = slice.tensor;
  const float scale = update_scale(*tensor.threshold_state, s);
  Sums* const lanes = table.sums == nullptr ? nullptr : block.lanes();
  ChunkStatistics* shares = nullptr;
  if constexpr (storage == Storage::with_statistics) shares = block.chunk_statistics();
  block.each([=](int thread) {
    SIGNADAM_UNROLL
    for (int i = 0; i < piece_size; ++i)
      if (lanes != nullptr) lanes[place_of(lane_of(thread, i))] = {};
    if constexpr (storage == Storage::with_statistics) shares[thread] = {};
  });
  const auto stored = SliceOfAnyRule::of(slice, step.rule);
  const int pieces = pieces_of(slice.count, tensor.head);
  SIGNADAM_ROLLED
  for (int first = 0; first < pieces; first += threads_per_block)
    block.template in_fours<PendingMoment>(
        [&](int thread, PendingMoment& pending) {
          if (first + thread >= pieces) return uint32_t{0};
          return run_piece_of_any_rule<threshold_pass, storage>(stored, step, s, scale, first + thread, lanes, thread,
                                                                shares, pending);
        },
        [&](int thread, const PendingMoment& pending, uint32_t largest) {
          if (threshold_pass != ThresholdPass::pass_before && stored.in_blocks() && first + thread < pieces)
            stored.exp_avg.store_scaled(first + thread, pending.m, pending.r, largest);
        });
  if constexpr (storage == Storage::with_statistics)
    finish_chunk_statistics(block, shares, s.alpha, table.chunk_statistics + chunk);
  if (lanes == nullptr) return;
  block.each([](int) {});  // in_fours synchronised groups of 4 threads, not the block
  halve(block, lanes);
  block.alone([&] { table.sums[chunk] = sum_of_halved(lanes); });
  if (block.arrives_last(table.arrivals + index, static_cast<uint32_t>(chunks_of(tensor.numel))))
    finish_statistics(block, table, tensor, [&](double state, const Sums& sums) {
      return s.clips ? next_norm(state, sums) : next_scale(state, sums, tensor.numel, s);
    });
}

}  // namespace signadam
