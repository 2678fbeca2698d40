// One optimizer step on the CPU: every chunk of every tensor, on several threads.
#pragma once

#include <vector>

#include "../block/block.h"
#include "kernels.h"

namespace signadam::cpu {

// Runs of chunks [unit[i], unit[i + 1]) worth handing to a thread: small tensors share one.
std::vector<uint32_t> make_units(const TableView& table, uint32_t tensors, uint32_t chunks);

// `threshold_pass` as for the device; `only` is followed by the update in the same call. `lanes`: room for
// lanes_for(chunks of the largest tensor) sums, where there are statistics. Nothing is allocated, so nothing fails half
// way.
void run(RuleIndex rule, ThresholdPass threshold_pass, const TableView& table, uint32_t tensors, const Step& step,
         const std::vector<uint32_t>& units, int threads, Sums* lanes);

// The sum of squares of each tensor's gradient as it is, in double, in the order of the sums for a threshold; 0 where
// there is none.
std::vector<double> squares(const TableView& table, uint32_t tensors, uint32_t chunks, const void* const* grads,
                            const std::vector<uint32_t>& units, int threads);

// The sum of the elements of a vector in the order in which a tensor's are added.
double ordered_sum(const std::vector<double>& x);

}  // namespace signadam::cpu
