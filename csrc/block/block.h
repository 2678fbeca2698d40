// What one block of 256 threads does with one chunk. Written against a `Block` that runs a phase on all threads and
// waits for them, so the very text that a GPU executes also runs on the host, thread by thread, under sanitizers.
#pragma once

#include "../core/rules.h"
#include "../core/step_statistics.h"
#include "../core/threshold.h"
#include "operand.h"
#include "stored.h"

namespace signadam {

enum class ThresholdPass {
  none,         // update only
  same_pass,    // update, and sum the gradient for the next step's threshold (adaptive_delayed)
  pass_before,  // sum the gradient for this step's threshold (adaptive, first launch)
};

// `plain`: tables of plain tensors only, and rules that have no auxiliary operand; `any`: all; `with_statistics`: all,
// and gathers the statistics of each chunk.
enum class Storage { plain, any, with_statistics };

// Pieces whose loads a thread issues before it uses the first: as many as stay in 128 registers beside the arithmetic.
// One piece of four operands is 128 bytes under way, 64 KB per multiprocessor with two blocks.
template <class Rule, ThresholdPass threshold_pass>
constexpr int pieces_in_flight =
    Rule::moments > 1 || Rule::divides || threshold_pass == ThresholdPass::same_pass ? 1 : 2;

// The elements of a piece in registers: summed into the thread's lanes, updated, or both.
template <class Rule, ThresholdPass threshold_pass>
SIGNADAM_HD void update_piece(const Scalars& s, float alpha, const Piece& piece, float* p, const float* g, float* m,
                              float* v, float* x, Sums* lanes) {
  if constexpr (threshold_pass != ThresholdPass::none) {
    const auto sum = [&](bool steers) {
      SIGNADAM_UNROLL
      for (int i = 0; i < piece_size; ++i) {
        const int k = i - piece.offset;
        if (k >= 0 && k < piece.count) add(lanes[i], steers, alpha, effective_gradient(s, p[i], g[i]));
      }
    };
    if (s.steers)
      sum(true);
    else
      sum(false);
  }
  SIGNADAM_UNROLL
  for (int i = 0; i < piece_size; ++i) {
    if constexpr (threshold_pass != ThresholdPass::pass_before) apply<Rule>(s, alpha, p[i], g[i], m[i], v[i], x[i]);
  }
}

// All pieces of one thread. `lanes` are the thread's 8 lanes of the statistics.
template <class Rule, ThresholdPass threshold_pass>
SIGNADAM_HD void run_thread_plain(const Slice& slice, const Scalars& s, float alpha, int thread, Sums* lanes) {
  constexpr bool updates = threshold_pass != ThresholdPass::pass_before;
  constexpr int moments = updates ? Rule::moments : 0;
  constexpr int in_flight = pieces_in_flight<Rule, threshold_pass>;

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
      update_piece<Rule, threshold_pass>(s, alpha, piece, p, g, m, v, none, lanes);
      if constexpr (updates) param.store(piece, p);
      if constexpr (moments > 0) exp_avg.store(piece, m);
      if constexpr (moments > 1) exp_avg_sq.store(piece, v);
    }
  }
}

// Null where no statistics are gathered.
SIGNADAM_HD ChunkStatistics* share_of(ChunkStatistics* shares, int thread) {
  return shares == nullptr ? nullptr : shares + thread;
}

// A thread's share of the statistics, piece by piece.
template <bool has_momentum>
struct Observer {
  ChunkStatistics found{};
  uint32_t negative = 0, positive = 0;  // entries of the momentum before the step, a bit each

  SIGNADAM_HD void before(const Scalars& s, float alpha, const Piece& piece, const float* p, const float* g,
                          const float* m) {
    SIGNADAM_UNROLL
    for (int i = 0; i < piece_size; ++i) {
      const int k = i - piece.offset;
      if (k < 0 || k >= piece.count) continue;
      observe_gradient(found, effective_gradient(s, p[i], g[i]), alpha);
      if constexpr (has_momentum) {
        negative |= (m[i] < 0.0f ? 1u : 0u) << i;
        positive |= (m[i] > 0.0f ? 1u : 0u) << i;
      }
    }
  }

  SIGNADAM_HD void after(const Piece& piece, const float* m, ChunkStatistics* own) {
    if constexpr (has_momentum) {
      SIGNADAM_UNROLL
      for (int i = 0; i < piece_size; ++i) {
        const int k = i - piece.offset;
        if (k < 0 || k >= piece.count) continue;
        const float before = (negative >> i & 1u) != 0 ? -1.0f : (positive >> i & 1u) != 0 ? 1.0f : 0.0f;
        observe_momentum(found, before, m[i]);
      }
    }
    add(*own, found);
  }
};

// The operands of a slice in any storage form. Forms are uniform over the chunk, so branches on them do not diverge.
template <class Rule, ThresholdPass threshold_pass, Storage storage>
struct StoredSlice {
  static constexpr bool updates = threshold_pass != ThresholdPass::pass_before;
  static constexpr bool sums = threshold_pass != ThresholdPass::none;
  static constexpr int moments = updates ? Rule::moments : 0;
  static constexpr bool aux = updates && has_third<Rule>;
  static constexpr bool observes = updates && storage == Storage::with_statistics;

  StoredParam param;
  Operand grad;
  StoredMoment exp_avg;
  WideMoment exp_avg_sq, exp_third;
  PieceBits rng_keys;
  int count, head;

  SIGNADAM_HD static StoredSlice of(const Slice& slice) {
    const TensorEntry& tensor = slice.tensor;
    return {StoredParam::of(slice),
            Operand::of(slice.grad, tensor.formats.grad, slice),
            StoredMoment::of(tensor.exp_avg, tensor.formats.exp_avg, slice),
            WideMoment::of(tensor.exp_avg_sq, tensor.formats.exp_avg_sq, slice),
            WideMoment::of(tensor.aux, tensor.formats.aux, slice),
            PieceBits::of(slice),
            slice.count,
            tensor.head};
  }

  SIGNADAM_HD Piece piece(int index) const { return piece_of(index, count, head); }

  // `keep_m(m, r)` stores the new m or keeps it for later, with the random bits for it.
  template <class KeepM>
  SIGNADAM_HD void update(const Scalars& s, float alpha, int index, Sums* lanes, ChunkStatistics* own,
                          KeepM keep_m) const {
    const Piece piece = this->piece(index);
    const bool reads_param = updates || s.coupled;
    // Random bits are drawn before the loads and the parameter is stored before m, but beside the sums later and after
    // it: an order in which 128 registers suffice on every architecture.
    RandomHalves r;
    if constexpr (updates && !sums) r = rng_keys.at(piece);
    const Raw raw_g = grad.load(piece);
    ParamRaw raw_p;
    Raw raw_m, raw_v, raw_x;
    if (reads_param) raw_p = param.load(piece);
    if constexpr (moments > 0) raw_m = exp_avg.load(piece, index);
    if constexpr (moments > 1) raw_v = exp_avg_sq.load(piece);
    if constexpr (aux) raw_x = exp_third.load(piece);
    float p[piece_size] = {}, g[piece_size], m[piece_size], v[piece_size], x[piece_size];
    grad.unpack(raw_g, g);
    if (reads_param) param.unpack(raw_p, p);
    if constexpr (moments > 0) exp_avg.unpack(raw_m, m);
    if constexpr (moments > 1) exp_avg_sq.unpack(raw_v, v);
    if constexpr (aux) exp_third.unpack(raw_x, x);
    Observer<(moments > 0)> observer;
    if constexpr (observes) observer.before(s, alpha, piece, p, g, m);
    update_piece<Rule, threshold_pass>(s, alpha, piece, p, g, m, v, x, lanes);
    if constexpr (observes) observer.after(piece, m, own);
    if constexpr (updates) {
      if constexpr (sums) r = rng_keys.at(piece);
      if constexpr (moments > 0 && sums) keep_m(m, r);
      param.store(piece, p, r);
      if constexpr (moments > 0 && !sums) keep_m(m, r);
      if constexpr (moments > 1) exp_avg_sq.store(piece, v, [&](int i) { return bits_for_v(r.of(i)); });
      if constexpr (moments > 2) exp_third.store(piece, x, [&](int i) { return bits_for_aux(r.of(i)); });
    }
  }
};

template <class Rule, ThresholdPass threshold_pass, Storage storage>
SIGNADAM_HD void run_thread_stored(const Slice& slice, const Scalars& s, float alpha, int thread, Sums* lanes,
                                   ChunkStatistics* own) {
  const auto stored = StoredSlice<Rule, threshold_pass, storage>::of(slice);
  const int pieces = pieces_of(slice.count, slice.tensor.head);
  SIGNADAM_ROLLED
  for (int index = thread; index < pieces; index += threads_per_block) {
    const Piece piece = stored.piece(index);
    if (piece.count == 0) continue;
    stored.update(s, alpha, index, lanes, own, [&](const float* m, const RandomHalves& r) {
      stored.exp_avg.store(piece, index, m, [&](int i) { return bits_for_m(r.of(i)); });
    });
  }
}

// A piece of m between the update and the exponent that it shares with three others.
struct PendingMoment {
  float m[piece_size];
  RandomHalves r;
};

// Block-scaled moments: four neighbouring threads have the pieces of one exponent.
template <class Rule, Storage storage, class Block>
SIGNADAM_HD void run_block_scaled(Block& block, const Slice& slice, const Scalars& s, float alpha,
                                  ChunkStatistics* chunk_statistics) {
  const auto stored = StoredSlice<Rule, ThresholdPass::none, storage>::of(slice);
  const int pieces = pieces_of(slice.count, 0);
  for (int first = 0; first < pieces; first += threads_per_block)
    block.template in_fours<PendingMoment>(
        [&](int thread, PendingMoment& pending) {
          uint32_t largest = 0;
          if (first + thread >= pieces) return largest;
          stored.update(s, alpha, first + thread, nullptr, share_of(chunk_statistics, thread),
                        [&](const float* m, const RandomHalves& r) {
                          pending.r = r;
                          SIGNADAM_UNROLL
                          for (int i = 0; i < piece_size; ++i) {
                            pending.m[i] = m[i];
                            const uint32_t magnitude = finite_magnitude(m[i]);
                            largest = magnitude > largest ? magnitude : largest;
                          }
                        });
          return largest;
        },
        [&](int thread, const PendingMoment& pending, uint32_t largest) {
          if (first + thread < pieces) stored.exp_avg.store_scaled(first + thread, pending.m, pending.r, largest);
        });
}

template <class Rule, ThresholdPass threshold_pass, Storage storage>
SIGNADAM_HD void run_thread(const Slice& slice, const Scalars& s, float alpha, int thread, Sums* lanes,
                            ChunkStatistics* own) {
  if constexpr (storage == Storage::plain)
    run_thread_plain<Rule, threshold_pass>(slice, s, alpha, thread, lanes);
  else
    run_thread_stored<Rule, threshold_pass, storage>(slice, s, alpha, thread, lanes, own);
}

// lanes[0] becomes the sum of all lanes: x[:h] + x[h:] for h = 1024, 512, ..., 1.
template <class Block>
SIGNADAM_HD void halve(Block& block, Sums* lanes) {
  for (int h = lane_count / 2; h >= 1; h /= 2)
    block.each([=](int thread) {
      for (int i = thread; i < h; i += threads_per_block) add(lanes[i], lanes[i + h]);
    });
}

// The chunk sums of a tensor go through the chunk procedure until one is left, which moves the gate.
template <class Block>
SIGNADAM_HD void finish_statistics(Block& block, const TableView& table, const TensorEntry& tensor, const Scalars& s) {
  Sums* const sums = table.sums + tensor.first_chunk;
  Sums* const lanes = block.lanes();
  int64_t count = chunks_of(tensor.numel);
  while (count > 1) {
    const int64_t next = chunks_of(count);
    for (int64_t k = 0; k < next; ++k) {
      const Sums* const x = sums + k * chunk_size;
      const int64_t left = count - k * chunk_size;
      const int64_t size = left < chunk_size ? left : chunk_size;
      block.each([=](int thread) {
        for (int lane = thread; lane < lane_count; lane += threads_per_block) lanes[lane] = lane_of_sums(x, size, lane);
      });
      halve(block, lanes);
      block.each([=](int thread) {
        if (thread == 0) sums[k] = lanes[0];
      });
    }
    count = next;
  }
  block.each([=](int thread) {
    if (thread == 0) *tensor.threshold_state = next_threshold_state(*tensor.threshold_state, sums[0], tensor.numel, s);
  });
}

// The threads' shares of the statistics become the chunk's.
template <class Block>
SIGNADAM_HD void finish_chunk_statistics(Block& block, ChunkStatistics* shares, float alpha, ChunkStatistics* to) {
  block.each([](int) {});  // in_fours synchronised groups of 4 threads, not the block
  for (int h = threads_per_block / 2; h >= 1; h /= 2)
    block.each([=](int thread) {
      if (thread < h) add(shares[thread], shares[thread + h]);
    });
  block.each([=](int thread) {
    if (thread != 0) return;
    shares[0].threshold = alpha;
    *to = shares[0];
  });
}

// The update of one chunk, without statistics for the gate.
template <class Rule, Storage storage, class Block>
SIGNADAM_HD void update_chunk(Block& block, const Slice& slice, const Scalars& s, float alpha,
                              ChunkStatistics* shares) {
  if constexpr (storage != Storage::plain && Rule::moments > 0 && !Rule::bounded)
    if (slice.tensor.formats.exp_avg == Format::block8)
      return run_block_scaled<Rule, storage>(block, slice, s, alpha, shares);
  block.each([&](int thread) {
    run_thread<Rule, ThresholdPass::none, storage>(slice, s, alpha, thread, nullptr, share_of(shares, thread));
  });
}

template <class Rule, ThresholdPass threshold_pass, Storage storage, class Block>
SIGNADAM_HD void run_block(Block& block, const TableView& table, const Step& step, uint32_t chunk) {
  const Slice slice = slice_of(table, step, chunk);
  if (slice.grad == nullptr) return;
  const uint32_t index = table.tensor_of_chunk[chunk];
  const Scalars& s = step.scalars[step.scalar_indices[index]];
  const float alpha = threshold_pass == ThresholdPass::pass_before ? 0.0f : threshold(slice.tensor, s);

  ChunkStatistics* shares = nullptr;
  if constexpr (storage == Storage::with_statistics) {
    shares = block.chunk_statistics();
    block.each([=](int thread) { shares[thread] = ChunkStatistics{}; });
  }
  if constexpr (threshold_pass == ThresholdPass::none) {
    update_chunk<Rule, storage>(block, slice, s, alpha, shares);
    if constexpr (storage == Storage::with_statistics)
      finish_chunk_statistics(block, shares, alpha, table.chunk_statistics + chunk);
  } else {
    Sums* const lanes = block.lanes();
    block.each([&](int thread) {
      Sums own[piece_size] = {};
      run_thread<Rule, threshold_pass, storage>(slice, s, alpha, thread, own, share_of(shares, thread));
      SIGNADAM_UNROLL
      for (int i = 0; i < piece_size; ++i) lanes[lane_of(thread, i, slice.tensor.head)] = own[i];
    });
    halve(block, lanes);
    block.each([&](int thread) {
      if (thread == 0) table.sums[chunk] = lanes[0];
    });
    if constexpr (storage == Storage::with_statistics)
      finish_chunk_statistics(block, shares, alpha, table.chunk_statistics + chunk);
    // The last block of a tensor to finish has every other's threshold read behind it, so it may move the gate.
    // Read again: kept in registers over the update, it would be spilled.
    const TensorEntry& tensor = table.tensors[index];
    if (block.arrives_last(table.arrivals + index, static_cast<uint32_t>(chunks_of(tensor.numel))))
      finish_statistics(block, table, tensor, s);
  }
}

}  // namespace signadam
