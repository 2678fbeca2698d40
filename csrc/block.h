// What one block of 256 threads does with one chunk. Written against a `Block` that runs a phase on all threads and
// waits for them, so the very text that a GPU executes also runs on the host, thread by thread, under sanitizers.
#pragma once

#include "rules.h"
#include "statistics.h"
#include "traversal.h"

namespace signadam {

// The bits of a piece as they lie in memory: one word per fp32, half a word per 16-bit element.
struct Raw {
  uint32_t word[piece_size];
};

#if defined(__CUDA_ARCH__)
using Words = uint4;
SIGNADAM_HD Words load_words(const void* address) { return __ldcs(static_cast<const uint4*>(address)); }
SIGNADAM_HD void store_words(void* address, Words x) { __stcs(static_cast<uint4*>(address), x); }
#else
struct alignas(16) Words {
  uint32_t x, y, z, w;
};
SIGNADAM_HD Words load_words(const void* address) { return *static_cast<const Words*>(address); }
SIGNADAM_HD void store_words(void* address, Words x) { *static_cast<Words*>(address) = x; }
#endif

template <class T>
SIGNADAM_HD T load_one(const T* address) {
#if defined(__CUDA_ARCH__)
  return __ldcs(address);
#else
  return *address;
#endif
}

template <class T>
SIGNADAM_HD void store_one(T* address, T x) {
#if defined(__CUDA_ARCH__)
  __stcs(address, x);
#else
  *address = x;
#endif
}

// One tensor operand of a slice. Alignment and format are uniform over the chunk, so branches on them do not diverge.
struct Operand {
  unsigned char* begin;  // of the chunk
  Format format;
  bool aligned;  // whole pieces lie on 16-byte boundaries

  SIGNADAM_HD static Operand of(const void* base, Format format, const Slice& slice) {
    // One operand type serves reading and writing; gradients are only ever read.
    auto* begin = static_cast<unsigned char*>(const_cast<void*>(base)) + slice.begin * size_of(format);
    const auto border = reinterpret_cast<uintptr_t>(begin) + slice.tensor.head * size_of(format);
    return {begin, format, border % 16 == 0};
  }

  SIGNADAM_HD Raw load(const Piece& piece) const {
    Raw raw{};
    const unsigned char* at = begin + piece.begin * size_of(format);
    if (aligned && piece.whole()) {
      const Words low = load_words(at);
      raw.word[0] = low.x, raw.word[1] = low.y, raw.word[2] = low.z, raw.word[3] = low.w;
      if (format == Format::fp32) {
        const Words high = load_words(at + 16);
        raw.word[4] = high.x, raw.word[5] = high.y, raw.word[6] = high.z, raw.word[7] = high.w;
      }
      return raw;
    }
    SIGNADAM_UNROLL
    for (int i = 0; i < piece_size; ++i) {
      const int k = i - piece.offset;
      if (k < 0 || k >= piece.count) continue;
      if (format == Format::fp32)
        raw.word[i] = load_one(reinterpret_cast<const uint32_t*>(at) + k);
      else
        raw.word[i / 2] |= static_cast<uint32_t>(load_one(reinterpret_cast<const uint16_t*>(at) + k)) << (16 * (i % 2));
    }
    return raw;
  }

  SIGNADAM_HD void unpack(const Raw& raw, float* x) const {
    SIGNADAM_UNROLL
    for (int i = 0; i < piece_size; ++i)
      x[i] = format == Format::fp32 ? float_of(raw.word[i])
                                    : widen(format, static_cast<uint16_t>(raw.word[i / 2] >> (16 * (i % 2))));
  }

  SIGNADAM_HD void store(const Piece& piece, const float* x) const {
    Raw raw{};
    SIGNADAM_UNROLL
    for (int i = 0; i < piece_size; ++i) {
      if (format == Format::fp32)
        raw.word[i] = bits_of(x[i]);
      else
        raw.word[i / 2] |= static_cast<uint32_t>(narrow(format, x[i])) << (16 * (i % 2));
    }
    unsigned char* at = begin + piece.begin * size_of(format);
    if (aligned && piece.whole()) {
      store_words(at, Words{raw.word[0], raw.word[1], raw.word[2], raw.word[3]});
      if (format == Format::fp32) store_words(at + 16, Words{raw.word[4], raw.word[5], raw.word[6], raw.word[7]});
      return;
    }
    SIGNADAM_UNROLL
    for (int i = 0; i < piece_size; ++i) {
      const int k = i - piece.offset;
      if (k < 0 || k >= piece.count) continue;
      if (format == Format::fp32)
        store_one(reinterpret_cast<uint32_t*>(at) + k, raw.word[i]);
      else
        store_one(reinterpret_cast<uint16_t*>(at) + k, static_cast<uint16_t>(raw.word[i / 2] >> (16 * (i % 2))));
    }
  }
};

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
  const Operand param = Operand::of(slice.tensor.param, slice.tensor.param_format, slice);
  const Operand grad = Operand::of(slice.grad, slice.tensor.grad_format, slice);
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

template <class Rule, Statistics statistics, class Block>
SIGNADAM_HD void run_block(Block& block, const TableView& table, const Step& step, uint32_t chunk) {
  const Slice slice = slice_of(table, step, chunk);
  if (slice.grad == nullptr) return;
  const uint32_t index = table.tensor_of_chunk[chunk];
  const Scalars& s = step.scalars[step.rows[index]];
  const float alpha = statistics == Statistics::only ? 0.0f : threshold(slice.tensor, s);

  if constexpr (statistics == Statistics::none) {
    block.each([&](int thread) { run_thread<Rule, statistics>(slice, s, alpha, thread, nullptr); });
  } else {
    Sums* const lanes = block.lanes();
    block.each([&](int thread) {
      Sums own[piece_size] = {};
      run_thread<Rule, statistics>(slice, s, alpha, thread, own);
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
