// What one block does with one chunk for the norm of all gradients: the sum of the squares of each tensor's gradient,
// as it lies in memory, by the additions of core/threshold.h.
#pragma once

#include "block.h"

namespace signadam {

// Beside the table. `grads[i] == nullptr`: tensor i takes no part, and its total stays as it is.
struct NormView {
  const void* const* grads;
  double* sums;        // one per chunk
  uint32_t* arrivals;  // one per tensor, zero between launches
  double* totals;
  const int32_t* places;  // of each tensor's sum in `totals`
};

// Pieces whose loads a thread issues before it uses the first; those of a full chunk are a multiple of them.
constexpr int pieces_in_flight_of_norm = 4;

// The lanes of one thread.
template <Format format, ChunkKind kind>
SIGNADAM_HD void square_pieces(const Slice& slice, int thread, double* lanes) {
  constexpr int in_flight = pieces_in_flight_of_norm;
  Operand grad = Operand::of(slice.grad, format, slice);
  if constexpr (kind == ChunkKind::full) grad.aligned = true;
  const int pieces =
      kind == ChunkKind::full ? static_cast<int>(chunk_size) / piece_size : pieces_of(slice.count, slice.tensor.head);
  SIGNADAM_ROLLED
  for (int first = thread; first < pieces; first += in_flight * threads_per_block) {
    Raw raw[in_flight];
    SIGNADAM_UNROLL
    for (int u = 0; u < in_flight; ++u) raw[u] = grad.load(piece_of<kind>(first + u * threads_per_block, slice));
    SIGNADAM_UNROLL
    for (int u = 0; u < in_flight; ++u) {
      float g[piece_size];
      grad.unpack(raw[u], g);
      // What a piece lacks is +0, whose square changes no sum.
      SIGNADAM_UNROLL
      for (int i = 0; i < piece_size; ++i) lanes[i] += static_cast<double>(g[i]) * static_cast<double>(g[i]);
    }
  }
}

template <Format format>
SIGNADAM_HD void square_pieces(const Slice& slice, int thread, double* lanes) {
  if (slice.count == chunk_size && slice.tensor.head == 0 && reinterpret_cast<uintptr_t>(slice.grad) % 16 == 0)
    square_pieces<format, ChunkKind::full>(slice, thread, lanes);
  else
    square_pieces<format, ChunkKind::any>(slice, thread, lanes);
}

template <class Block>
SIGNADAM_HD void run_norm_block(Block& block, const TableView& table, const NormView& norm, double* lanes,
                                uint32_t chunk) {
  const uint32_t index = table.tensor_of_chunk[chunk];
  Slice slice = slice_of(table, Step{norm.grads, nullptr, nullptr, nullptr}, chunk, index);
  if (slice.grad == nullptr) return;
  // Cut at the gradient's own boundaries: no other operand is touched.
  const Format format = slice.tensor.formats.grad;
  slice.tensor.head = head_of(slice.grad, format);
  block.each([&](int thread) {
    double own[piece_size] = {};
    if (format == Format::fp32)
      square_pieces<Format::fp32>(slice, thread, own);
    else if (format == Format::bf16)
      square_pieces<Format::bf16>(slice, thread, own);
    else
      square_pieces<Format::fp16>(slice, thread, own);
    SIGNADAM_UNROLL
    for (int i = 0; i < piece_size; ++i) lanes[place_of(lane_of(thread, i))] = own[i];
  });
  halve(block, lanes);
  block.alone([&] { norm.sums[chunk] = sum_of_halved(lanes); });
  const int64_t chunks = chunks_of(slice.tensor.numel);
  if (!block.arrives_last(norm.arrivals + index, static_cast<uint32_t>(chunks))) return;
  double* const sums = norm.sums + slice.tensor.first_chunk;
  sum_chunks(block, lanes, sums, chunks);
  block.alone([&] { norm.totals[norm.places[index]] = sums[0]; });
}

}  // namespace signadam
