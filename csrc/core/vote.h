// Ternary votes: what workers send of their gradients or updates, 2 bits an entry, and what comes back of the count.
//
// A tensor's codes fill words of 32 bits, 16 codes each, as int2 moments lie in memory: entry i at bits 2 * (i % 16).
// Each tensor begins with a word of its own, so that no two threads share one; what is left of its last word is 0.
#pragma once

#include "formats.h"
#include "random.h"
#include "rules.h"

namespace signadam {

constexpr int codes_per_word = 16;
// Entries of one tensor that one thread of the CPU or one block of a GPU takes at a time.
constexpr int64_t vote_chunk = 16384;

// The code of an entry that is not finite on some worker: it stays that through the count, and becomes NaN for all.
SIGNADAM_HD constexpr int32_t spoiled_code(int bits) { return -(1 << (bits - 1)); }

// One tensor; the rows of the table that Python writes, so every field is an int64. Addresses are 0 where there is
// nothing. `first_word` is its place in the words, `first_chunk` its first in the launch.
struct VoteEntry {
  int64_t values, momentum, residual, numel, first_word, first_chunk;
};

// What holds for one tensor; the rows of a matrix of fp32. `scale` is what a vote takes off the residual. Momentum
// enters the vote by beta1 and is kept by beta2. `lr` and `decay` belong to an update by what came back.
#define SIGNADAM_VOTE_SCALARS(X) \
  X(threshold)                   \
  X(scale)                       \
  X(beta1)                       \
  X(one_minus_beta1)             \
  X(beta2)                       \
  X(one_minus_beta2)             \
  X(lr)                          \
  X(decay)
struct VoteScalars {
#define SIGNADAM_FIELD(name) float name;
  SIGNADAM_VOTE_SCALARS(SIGNADAM_FIELD)
#undef SIGNADAM_FIELD
};

// The tensors of a launch: entries, and for each chunk the entry that it is of.
struct VoteTable {
  const VoteEntry* entries;
  const int32_t* entry_of_chunk;
  int64_t chunks;
  const VoteScalars* scalars;
};

// What a worker keeps of earlier gradients: nothing, a moving average of them, or one of their gated signs.
enum class VoteMemory : uint8_t { none, gradients, gated_signs };

// How all votes of a launch are cast: the gradient's sign is turned, or not; the code of what is not finite.
struct VoteOptions {
  VoteMemory memory;
  bool residual, maximize;
  int32_t spoiled;
};

// The widths that a result may have, by their index in tables of kernels.
constexpr int vote_widths[] = {2, 4, 8, 16};

SIGNADAM_HD bool is_finite_bits(float x) { return (bits_of(x) & 0x7f800000u) != 0x7f800000u; }

// The vote of one entry, and its memory afterwards; an entry that is not finite leaves its memory as it was.
template <VoteMemory memory, bool residual>
SIGNADAM_HD int32_t cast_vote(const VoteScalars& s, bool maximize, int32_t spoiled, float g, float& m, float& r) {
  g = maximize ? -g : g;
  float u = g, kept = m;
  if (memory != VoteMemory::none) {
    const float x = memory == VoteMemory::gated_signs ? gated_sign(g, s.threshold) : g;
    u = s.beta1 * m + s.one_minus_beta1 * x;
    kept = s.beta2 * m + s.one_minus_beta2 * x;
  }
  if (residual) u = u + r;
  const bool finite = is_finite_bits(g) & is_finite_bits(u);  // not &&, which compilers make a branch of
  const float c = gated_sign(u, memory == VoteMemory::gated_signs ? 0.0f : s.threshold);
  const float left = u - s.scale * c;
  if (memory != VoteMemory::none) m = finite ? kept : m;
  if (residual) r = finite ? left : r;
  const int32_t code = static_cast<int32_t>(c);
  return finite ? code : spoiled;
}

// The field of `bits` bits at `place` of a word, with its sign.
SIGNADAM_HD int32_t code_at(uint32_t word, int bits, int place) {
  return static_cast<int32_t>(word << (32 - bits * (place + 1))) >> (32 - bits);
}

SIGNADAM_HD uint32_t code_bits(int32_t code, int bits, int place) {
  return (static_cast<uint32_t>(code) & (0xffffffffu >> (32 - bits))) << (bits * place);
}

// The high bits of the codes of a word that are spoiled (0b10).
SIGNADAM_HD uint32_t spoiled_in(uint32_t word) { return word & ~(word << 1) & 0xaaaaaaaau; }

// A tie is 0.
SIGNADAM_HD int32_t majority_of(int32_t sum) { return (sum > 0) - (sum < 0); }

// What came back of an entry: the majority, or with `divisor` the number of workers, the mean.
SIGNADAM_HD float vote_value(int32_t code, int bits, float divisor) {
  return code == spoiled_code(bits) ? float_of(0x7fc00000u) : static_cast<float>(code) / divisor;
}

// How a result is used: written as the gradient, or applied to a parameter, which is rounded to nearest or at random.
enum class VoteUse : uint8_t { write, step, step_stochastic };

// Where nothing is known, the parameter stays, without decay too.
SIGNADAM_HD float stepped(const VoteScalars& s, float p, float vote) {
  const float next = p * s.decay - s.lr * vote;
  return vote == vote ? next : p;
}

}  // namespace signadam
