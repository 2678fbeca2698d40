// What a block adds up, in an order that every backend shares: the lanes of a chunk, the chunks of a tensor; and the
// statistics, in an order of its own.
#pragma once

#include "../core/step_statistics.h"
#include "../core/threshold.h"
#include "traversal.h"

namespace signadam {

// What a thread adds to the statistics of its piece.
template <bool has_momentum>
struct Observer {
  uint32_t negative = 0, positive = 0;  // entries of the momentum before the step, a bit each

  SIGNADAM_HD void before(float alpha, const Piece& piece, const float* g, const float* m, ChunkStatistics* found) {
    SIGNADAM_UNROLL
    for (int i = 0; i < piece_size; ++i) {
      const int k = i - piece.offset;
      if (k < 0 || k >= piece.count) continue;
      observe_gradient(*found, g[i], alpha);
      if constexpr (has_momentum) {
        negative |= (m[i] < 0.0f ? 1u : 0u) << i;
        positive |= (m[i] > 0.0f ? 1u : 0u) << i;
      }
    }
  }

  SIGNADAM_HD void after(const Piece& piece, const float* m, ChunkStatistics* found) {
    if constexpr (has_momentum) {
      SIGNADAM_UNROLL
      for (int i = 0; i < piece_size; ++i) {
        const int k = i - piece.offset;
        if (k < 0 || k >= piece.count) continue;
        const float before = (negative >> i & 1u) != 0 ? -1.0f : (positive >> i & 1u) != 0 ? 1.0f : 0.0f;
        observe_momentum(*found, before, m[i]);
      }
    }
  }
};

// Eight lanes that lie `apart`, halved until the first has their sum.
template <class Sum>
SIGNADAM_HD void halve_eight(Sum* lanes, int apart) {
  Sum own[8];
  SIGNADAM_UNROLL
  for (int i = 0; i < 8; ++i) own[i] = lanes[i * apart];
  SIGNADAM_UNROLL
  for (int h = 4; h >= 1; h /= 2) {
    SIGNADAM_UNROLL
    for (int i = 0; i < h; ++i) add(own[i], own[i + h]);
  }
  lanes[0] = own[0];
}

// The sum of all lanes, at their places: x[:h] + x[h:] for h = 1024, 512, ..., 1. A thread takes three turns at once,
// of eight lanes that nobody else needs; the last five are left to `sum_of_halved`.
template <class Sum, class Block>
SIGNADAM_HD void halve(Block& block, Sum* lanes) {
  static_assert(threads_per_block == 8 * 32 && piece_size == 8);
  block.each([=](int thread) { halve_eight(lanes + thread / 32 * threads_per_block + thread % 32, 32); });
  block.each([=](int thread) {
    if (thread < 32) halve_eight(lanes + thread / 4 * threads_per_block + thread % 4, 4);
  });
}

template <class Sum>
SIGNADAM_HD Sum sum_of_halved(const Sum* lanes) {
  Sum own[piece_size];
  SIGNADAM_UNROLL
  for (int i = 0; i < piece_size; ++i) {
    const Sum* const four = lanes + i * threads_per_block;
    own[i] = four[0];
    Sum odd = four[1];
    add(own[i], four[2]);
    add(odd, four[3]);
    add(own[i], odd);
  }
  halve_eight(own, 1);
  return own[0];
}

// The sums of a tensor's `count` chunks go through the chunk procedure until the first is that of the tensor.
template <class Sum, class Block>
SIGNADAM_HD void sum_chunks(Block& block, Sum* lanes, Sum* sums, int64_t count) {
  while (count > 1) {
    const int64_t next = chunks_of(count);
    for (int64_t k = 0; k < next; ++k) {
      const Sum* const x = sums + k * chunk_size;
      const int64_t left = count - k * chunk_size;
      const int64_t size = left < chunk_size ? left : chunk_size;
      block.each([=](int thread) {
        for (int lane = thread; lane < lane_count; lane += threads_per_block)
          lanes[place_of(lane)] = lane_of_sums(x, size, lane);
      });
      halve(block, lanes);
      block.each([=](int thread) {
        if (thread == 0) sums[k] = sum_of_halved(lanes);
      });
    }
    count = next;
  }
}

// The sums of a tensor move its threshold, or what it has in that place, to `next(state, sums)`.
template <class Block, class Next>
SIGNADAM_HD void finish_statistics(Block& block, const TableView& table, const TensorEntry& tensor, Next next) {
  Sums* const sums = table.sums + tensor.first_chunk;
  sum_chunks(block, block.lanes(), sums, chunks_of(tensor.numel));
  block.alone([&] { *tensor.threshold_state = next(*tensor.threshold_state, sums[0]); });
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

}  // namespace signadam
