// What optimizer.statistics() tells of a step, gathered in the pass that updates.
#pragma once

#include "rules.h"
#include "table.h"

namespace signadam {

// The threshold as statistics see it, where the number of a tensor may be another.
SIGNADAM_HD float observed_threshold(const Scalars& s, float alpha) {
  return s.clips ? 0.0f : s.scales ? s.alpha : alpha;
}

// A gradient entry as the gate sees it.
SIGNADAM_HD void observe_gradient(ChunkStatistics& to, float g, float alpha) {
  const double square = static_cast<double>(g) * static_cast<double>(g);
  const bool passes = g > alpha || g < -alpha;
  to.squares += square;
  to.passed += passes ? 1.0 : 0.0;
  to.passed_squares += passes ? square : 0.0;
}

// The momentum of an entry before and after the step.
SIGNADAM_HD void observe_momentum(ChunkStatistics& to, float before, float after) {
  to.flips += (before < 0.0f && after > 0.0f) || (before > 0.0f && after < 0.0f) ? 1.0 : 0.0;
  to.magnitude += magnitude(after);
}

SIGNADAM_HD void add(ChunkStatistics& to, const ChunkStatistics& x) {
  to.passed += x.passed;
  to.squares += x.squares;
  to.passed_squares += x.passed_squares;
  to.flips += x.flips;
  to.magnitude += x.magnitude;
}

}  // namespace signadam
