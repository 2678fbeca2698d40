// The CPU kernels, compiled once per instruction set from kernels.inl.
#pragma once

#include "../core/rules.h"
#include "../core/step_statistics.h"
#include "../core/threshold.h"
#include "../core/vote.h"

namespace signadam::cpu {

// `chunk_statistics`: where the chunk's statistics go, or null.
using ChunkUpdate = void (*)(const Slice& slice, const Scalars& s, float alpha, ChunkStatistics* chunk_statistics);

// One chunk of a vote, see vote.inl. Words are those of the chunk.
using CastChunk = void (*)(const VoteEntry& entry, const VoteScalars& s, const VoteOptions& options, int64_t begin,
                           int64_t count, Format format, uint32_t* to);
using CountWords = void (*)(const uint32_t* codes, int64_t workers, int64_t stride, int64_t words, uint32_t* to);
using ReadChunk = void (*)(const VoteEntry& entry, const VoteScalars& s, const RngKey& key, int64_t begin,
                           int64_t count, Format format, VoteUse use, float divisor, const uint32_t* from);

struct Kernels {
  const char* name;
  ChunkUpdate update[rule_count];
  // S1 and S2 of a chunk's effective gradient, as yet unreduced over chunks.
  Sums (*sum)(const Slice& slice, const Scalars& s, float alpha);
  // The same where steps are scaled: how many entries of the step agree with the gradient, or the squares of the
  // parameter.
  Sums (*sum_step[rule_count])(const Slice& slice, const Scalars& s);
  CastChunk cast[3][2];  // by VoteMemory, and whether there is a residual
  CountWords majority;   // 2 bits an entry
  CountWords count[4];   // of 2, 4, 8 and 16 bits an entry
  ReadChunk read[4];     // the same
};

extern const Kernels portable_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
#endif

// The best the processor runs, or the one SIGNADAM_CPU_CAPABILITY names (portable, avx2, avx512), read once.
// Throws std::runtime_error for a name that is unknown or that this processor cannot run.
const Kernels& kernels();

}  // namespace signadam::cpu
