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

}  // namespace signadam::cpu
