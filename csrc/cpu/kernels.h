// The CPU kernels, compiled once per instruction set from kernels.inl.
#pragma once

#include "../core/rules.h"
#include "../core/step_statistics.h"
#include "../core/threshold.h"

namespace signadam::cpu {

// `chunk_statistics`: where the chunk's statistics go, or null.
using ChunkUpdate = void (*)(const Slice& slice, const Scalars& s, float alpha, ChunkStatistics* chunk_statistics);

struct Kernels {
  const char* name;
  ChunkUpdate update[rule_count];
  // S1 and S2 of a chunk's effective gradient, as yet unreduced over chunks.
  Sums (*sum)(const Slice& slice, const Scalars& s, float alpha);
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
