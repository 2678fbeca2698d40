// Which elements of a chunk does a thread of a block touch, and how wide. No arithmetic of any rule is here.
//
// A chunk is cut into pieces of 8 elements whose borders lie on the tensor's 16-byte boundaries: the first piece is
// the misaligned head, the last the tail, all others are whole. Piece v belongs to thread v mod 256. So each thread
// keeps the same 8 lanes of the statistics, which it can sum in registers, in row order, however the head falls.
#pragma once

#include "../core/table.h"

namespace signadam {

constexpr int threads_per_block = 256;
constexpr int piece_size = 8;
static_assert(threads_per_block * piece_size == lane_count, "a thread owns its lanes");

// Where piece 0 begins, relative to the chunk: at 0, or before it when the head is shorter than a piece.
SIGNADAM_HD int first_border(int head) { return head == 0 ? 0 : head - piece_size; }

SIGNADAM_HD int pieces_of(int count, int head) { return (count - first_border(head) + piece_size - 1) / piece_size; }

// Elements [begin, begin + count) of the chunk; `offset` is the place of `begin` in an unclipped piece.
struct Piece {
  int begin, count, offset;
  SIGNADAM_HD bool whole() const { return count == piece_size; }
};

SIGNADAM_HD Piece piece_of(int index, int chunk_count, int head) {
  const int border = first_border(head) + index * piece_size;
  const int begin = border < 0 ? 0 : border;
  const int end = border + piece_size < chunk_count ? border + piece_size : chunk_count;
  return {begin, end > begin ? end - begin : 0, begin - border};
}

// What is known of a chunk when a kernel is compiled.
enum class ChunkKind {
  any,
  full,               // `chunk_size` elements, all operands on 16-byte boundaries, no head
  full_but_gradient,  // the same, but the gradient lies anywhere: FSDP2's gradients are slices of one buffer
};

template <ChunkKind kind>
SIGNADAM_HD Piece piece_of(int index, const Slice& slice) {
  if constexpr (kind == ChunkKind::any) return piece_of(index, slice.count, slice.tensor.head);
  return {index * piece_size, piece_size, 0};
}

// The lane that entry `offset` of thread `thread`'s pieces belongs to, but for the head, by which all lanes are
// rotated: halving them gives the same sums then.
SIGNADAM_HD int lane_of(int thread, int offset) { return thread * piece_size + offset; }

// Where a lane lies: neighbouring threads have neighbouring places for entries at one offset.
SIGNADAM_HD int place_of(int lane) { return lane % piece_size * threads_per_block + lane / piece_size; }

// Elements before `address` reaches a 16-byte boundary, at most 7. An address that is no multiple of the element's
// size never reaches one: 0, and every access is narrow.
SIGNADAM_HD uint8_t head_of(const void* address, Format format) {
  const auto size = static_cast<uintptr_t>(size_of(format));
  const auto misaligned = reinterpret_cast<uintptr_t>(address) % 16;
  return static_cast<uint8_t>(misaligned % size != 0 ? 0 : (16 - misaligned) % 16 / size);
}

}  // namespace signadam
