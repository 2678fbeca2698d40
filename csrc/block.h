// What one block of 256 threads does with one chunk. Written against a `Block` that runs a phase on all threads and
// waits for them, so the very text that a GPU executes also runs on the host, thread by thread, under sanitizers.
#pragma once

#include "operand.h"
#include "rules.h"
#include "statistics.h"
#include "stored.h"

namespace signadam {

enum class Statistics {
  none,    // update only
  gather,  // update, and sum the gradient for the next step's threshold (adaptive_delayed)
  only,    // sum the gradient for this step's threshold (adaptive, first launch)
};

// Pieces whose loads a thread issues before it uses the first: as many as stay in 128 registers beside the arithmetic.
// One piece of four operands is 128 bytes under way, 64 KB per multiprocessor with two blocks.
template <class Rule, Statistics statistics>
constexpr int pieces_in_flight = Rule::moments > 1 || statistics == Statistics::gather ? 1 : 2;

// All pieces of one thread. `lanes` are the thread's 8 lanes of the statistics.
template <class Rule, Statistics statistics>
SIGNADAM_HD void run_thread(const Slice& slice, const Scalars& s, float alpha, int thread, Sums* lanes) {
  constexpr bool updates = statistics != Statistics::only;
  constexpr bool sums = statistics != Statistics::none;
  constexpr int moments = updates ? Rule::moments : 0;
  constexpr int in_flight = pieces_in_flight<Rule, statistics>;

  const int head = slice.tensor.head;
  const int pieces = pieces_of(slice.count, head);
  const bool reads_param = updates || s.coupled;
  const Operand param = Operand::of(slice.tensor.param, slice.tensor.formats.param, slice);
  const Operand grad = Operand::of(slice.grad, slice.tensor.formats.grad, slice);
  const Operand exp_avg = Operand::of(slice.tensor.exp_avg, Format::fp32, slice);
  const Operand exp_avg_sq = Operand::of(slice.tensor.exp_avg_sq, Format::fp32, slice);

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
      float p[piece_size] = {}, g[piece_size], m[piece_size], v[piece_size];
      grad.unpack(raw_g[u], g);
      if (reads_param) param.unpack(raw_p[u], p);
      if constexpr (moments > 0) exp_avg.unpack(raw_m[u], m);
      if constexpr (moments > 1) exp_avg_sq.unpack(raw_v[u], v);
      SIGNADAM_UNROLL
      for (int i = 0; i < piece_size; ++i) {
        if constexpr (sums) {
          const int k = i - piece.offset;
          if (k >= 0 && k < piece.count) add(lanes[i], effective_gradient(s, p[i], g[i]));
        }
        if constexpr (updates) apply<Rule>(s, alpha, p[i], g[i], m[i], v[i]);
      }
      if constexpr (updates) param.store(piece, p);
      if constexpr (moments > 0) exp_avg.store(piece, m);
      if constexpr (moments > 1) exp_avg_sq.store(piece, v);
    }
  }
}

// The same for tensors in any storage form. Forms are uniform over the chunk, so branches on them do not diverge.
template <class Rule, Statistics statistics>
SIGNADAM_HD void run_thread_stored(const Slice& slice, const Scalars& s, float alpha, int thread, Sums* lanes) {
  constexpr bool updates = statistics != Statistics::only;
  constexpr bool sums = statistics != Statistics::none;
  constexpr int moments = updates ? Rule::moments : 0;
  // An unbounded moment may be block-scaled: then a thread takes the 4 pieces of a block, one after another.
  constexpr bool blocks = moments > 0 && !Rule::bounded;
  constexpr int together = blocks ? packed_run / piece_size : pieces_in_flight<Rule, statistics>;
  static_assert(!(blocks && sums), "a thread that takes whole blocks does not own its lanes");

  const TensorEntry& tensor = slice.tensor;
  const int head = tensor.head;
  const int pieces = pieces_of(slice.count, head);
  const bool reads_param = updates || s.coupled;
  const StoredParam param = StoredParam::of(slice);
  const Operand grad = Operand::of(slice.grad, tensor.formats.grad, slice);
  const StoredMoment exp_avg = StoredMoment::of(tensor.exp_avg, tensor.formats.exp_avg, slice);
  const StoredMoment exp_avg_sq = StoredMoment::of(tensor.exp_avg_sq, tensor.formats.exp_avg_sq, slice);
  const PieceNoise noise = PieceNoise::of(slice);

  const auto piece_at = [&](int index, int u) {
    return blocks ? index * together + u : index + u * threads_per_block;
  };
  for (int index = thread; piece_at(index, 0) < pieces; index += blocks ? threads_per_block : together * threads_per_block) {
    ParamRaw raw_p[together];
    Raw raw_g[together], raw_m[together], raw_v[together];
    const auto load = [&](int u) {
      const int at = piece_at(index, u);
      const Piece piece = piece_of(at, slice.count, head);
      if (piece.count == 0) return;
      raw_g[u] = grad.load(piece);
      if (reads_param) raw_p[u] = param.load(piece);
      if constexpr (moments > 0) raw_m[u] = exp_avg.load(piece, at);
      if constexpr (moments > 1) raw_v[u] = exp_avg_sq.load(piece, at);
    };
    if constexpr (!blocks) {
      SIGNADAM_UNROLL
      for (int u = 0; u < together; ++u) load(u);
    }
    [[maybe_unused]] float run[blocks ? packed_run : 1] = {};
    [[maybe_unused]] uint32_t run_noise[blocks ? packed_run / 2 : 1] = {};
    SIGNADAM_UNROLL
    for (int u = 0; u < together; ++u) {
      if constexpr (blocks) load(u);
      const int at = piece_at(index, u);
      const Piece piece = piece_of(at, slice.count, head);
      if (piece.count == 0) continue;
      float p[piece_size] = {}, g[piece_size], m[piece_size], v[piece_size];
      grad.unpack(raw_g[u], g);
      if (reads_param) param.unpack(raw_p[u], p);
      if constexpr (moments > 0) exp_avg.unpack(raw_m[u], m);
      if constexpr (moments > 1) exp_avg_sq.unpack(raw_v[u], v);
      SIGNADAM_UNROLL
      for (int i = 0; i < piece_size; ++i) {
        if constexpr (sums) {
          const int k = i - piece.offset;
          if (k >= 0 && k < piece.count) add(lanes[i], effective_gradient(s, p[i], g[i]));
        }
        if constexpr (updates) apply<Rule>(s, alpha, p[i], g[i], m[i], v[i]);
      }
      if constexpr (updates) {
        const RandomHalves r = noise.at(piece);
        param.store(piece, p, r);
        if constexpr (moments > 1) exp_avg_sq.store(piece, at, v, [&](int i) { return bits_for_v(r.of(i)); });
        if constexpr (blocks) {
          SIGNADAM_UNROLL
          for (int i = 0; i < piece_size; ++i) run[u * piece_size + i] = m[i];
          SIGNADAM_UNROLL
          for (int i = 0; i < piece_size / 2; ++i) run_noise[u * (piece_size / 2) + i] = r.word[i];
        }
        if (moments > 0 && tensor.formats.exp_avg != Format::block8)
          exp_avg.store(piece, at, m, [&](int i) { return bits_for_m(r.of(i)); });
      }
    }
    if constexpr (blocks)
      if (tensor.formats.exp_avg == Format::block8) exp_avg.store_block(index, run, run_noise);
  }
}

enum class Storage { plain, any };

template <class Rule, Statistics statistics, Storage storage>
SIGNADAM_HD void run(const Slice& slice, const Scalars& s, float alpha, int thread, Sums* lanes) {
  if constexpr (storage == Storage::plain)
    run_thread<Rule, statistics>(slice, s, alpha, thread, lanes);
  else
    run_thread_stored<Rule, statistics>(slice, s, alpha, thread, lanes);
}

// lanes[0] becomes the sum of all lanes: x[:h] + x[h:] for h = 1024, 512, ..., 1.
template <class Block>
SIGNADAM_HD void halve(Block& block, Sums* lanes) {
  for (int h = lane_count / 2; h >= 1; h /= 2)
    block.each([=](int thread) {
      for (int i = thread; i < h; i += threads_per_block) add(lanes[i], lanes[i + h]);
    });
}

// The chunk sums of a tensor go through the chunk procedure until one is left, which moves the deviation.
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
    if (thread == 0) *tensor.exp_avg_std = next_deviation(*tensor.exp_avg_std, sums[0], tensor.numel, s);
  });
}

// `Storage::plain` serves tables of plain tensors only, `Storage::any` all.
template <class Rule, Statistics statistics, Storage storage, class Block>
SIGNADAM_HD void run_block(Block& block, const TableView& table, const Step& step, uint32_t chunk) {
  const Slice slice = slice_of(table, step, chunk);
  if (slice.grad == nullptr) return;
  const uint32_t index = table.tensor_of_chunk[chunk];
  const Scalars& s = step.scalars[step.rows[index]];
  const float alpha = statistics == Statistics::only ? 0.0f : threshold(slice.tensor, s);

  if constexpr (statistics == Statistics::none) {
    block.each([&](int thread) { run<Rule, statistics, storage>(slice, s, alpha, thread, nullptr); });
  } else {
    Sums* const lanes = block.lanes();
    block.each([&](int thread) {
      Sums own[piece_size] = {};
      run<Rule, statistics, storage>(slice, s, alpha, thread, own);
      SIGNADAM_UNROLL
      for (int i = 0; i < piece_size; ++i) lanes[lane_of(thread, i, slice.tensor.head)] = own[i];
    });
    halve(block, lanes);
    block.each([&](int thread) {
      if (thread == 0) table.sums[chunk] = lanes[0];
    });
    // The last block of a tensor to finish has every other's threshold read behind it, so it may move the deviation.
    // Read again: kept in registers over the update, it would be spilled.
    const TensorEntry& tensor = table.tensors[index];
    if (block.arrives_last(table.arrivals + index, static_cast<uint32_t>(chunks_of(tensor.numel))))
      finish_statistics(block, table, tensor, s);
  }
}

}  // namespace signadam
