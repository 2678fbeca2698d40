// Votes on the CPU: casting, counting and reading, each on several threads.
#pragma once

#include "kernels.h"

namespace signadam::cpu {

// Votes of all tensors into `codes`, where each tensor's words begin at its `first_word`.
void cast_votes(const VoteTable& table, const VoteOptions& options, Format format, uint32_t* codes, int threads);

// `words` of each of `workers`, one after the other, into `words * bits / 2` words of the result: the majority, of 2
// bits, or the sum.
void count_votes(const uint32_t* codes, int64_t workers, int64_t words, int bits, bool majority, uint32_t* result,
                 int threads);

// What came back, of `bits` bits an entry, to the tensors. `keys`: of each entry, for VoteUse::step_stochastic.
void read_votes(const VoteTable& table, const RngKey* keys, VoteUse use, Format format, int bits, float divisor,
                const uint32_t* result, int threads);

}  // namespace signadam::cpu
