// Steps that are multiplied by a number of the tensor's, caution [CO] and `lr_scale="rms"`: what they add up to make
// the next number, and the rule of kernels for just one rule.
#pragma once

#include <type_traits>

#include "../core/rules.h"
#include "../core/threshold.h"

namespace signadam {

// A rule whose steps are multiplied by a number of the tensor's. It stands in the place of a threshold.
template <class Rule>
struct Scaled : Rule {
  using Unscaled = Rule;
};

template <class Rule>
constexpr bool is_scaled = false;
template <class Rule>
constexpr bool is_scaled<Scaled<Rule>> = true;

// What a lane adds up: of the two sums a rule that is scaled takes one.
template <class Rule>
using LaneSum = std::conditional_t<is_scaled<Rule>, double, Sums>;

// What an entry adds to the one sum of which the next number is made: of the parameter `p` before the step.
SIGNADAM_HD double share_of_entry(const Scalars& s, float p, float step, float g) {
  return s.caution ? agreement(step, g) : static_cast<double>(p) * static_cast<double>(p);
}

// That sum in its place beside the other, which is 0.
SIGNADAM_HD Sums as_sums(const Scalars& s, double sum) { return s.caution ? Sums{sum, 0.0} : Sums{0.0, sum}; }

}  // namespace signadam
