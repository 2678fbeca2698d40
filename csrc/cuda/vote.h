// Votes on a GPU: one launch each, on `stream` of `device`. Every address is the device's. Never synchronizes; throws
// std::runtime_error with CUDA's own words where a launch fails. See csrc/cpu/vote.h for what each of them does.
#pragma once

#include "../core/vote.h"

namespace signadam::cuda {

void cast_votes(const VoteTable& table, const VoteOptions& options, Format format, uint32_t* codes, int device,
                void* stream);

void count_votes(const uint32_t* codes, int64_t workers, int64_t words, int bits, bool majority, uint32_t* result,
                 int device, void* stream);

void read_votes(const VoteTable& table, const RngKey* keys, VoteUse use, Format format, int bits, float divisor,
                const uint32_t* result, int device, void* stream);

}  // namespace signadam::cuda
