// Blocks that run csrc/block/block.h on the host, and the table they run over.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <type_traits>
#include <vector>

#include "../../csrc/block/block.h"

namespace signadam::host {

// The rules that a program looks at: all, or with SIGNADAM_QUICK one of those that share code in csrc/block: every
// number of moments, bounded and unbounded ones, a threshold, a variance that is given.
#if defined(SIGNADAM_QUICK)
#define SIGNADAM_HOST_RULES(X) X(SignSGD) X(Signum) X(SignAdam) X(SignAdamPP) X(MSVAGMinibatch) X(AdamAMSGrad)
#else
#define SIGNADAM_HOST_RULES(X) SIGNADAM_RULES(X)
#endif

// In which order threads or blocks run: a GPU promises none, so any must give the same result.
enum class Order : int { forward, reversed, shuffled };

inline std::vector<uint32_t> ordered(uint32_t count, Order order, std::mt19937& random) {
  std::vector<uint32_t> indices(count);
  std::iota(indices.begin(), indices.end(), 0u);
  if (order == Order::reversed) std::reverse(indices.begin(), indices.end());
  if (order == Order::shuffled) std::shuffle(indices.begin(), indices.end(), random);
  return indices;
}

// Which thread runs, for those who watch its accesses.
inline uint32_t running_chunk = 0;
inline int running_thread = 0;

// What a rule's first moment can be stored as.
template <class Rule>
std::vector<Format> first_forms() {
  if (Rule::moments == 0) return {Format::fp32};
  std::vector<Format> forms = {Format::fp32, Format::bf16};
#define SIGNADAM_APPEND(name)                                                                      \
  if (is_packed(Format::name) && (is_scale_free(Format::name) ? Rule::bounded : has_blocks<Rule>)) \
    forms.push_back(Format::name);
  SIGNADAM_FORMATS(SIGNADAM_APPEND)
#undef SIGNADAM_APPEND
  return forms;
}

// A block whose threads run one after another; a new order for every phase.
class HostBlock {
 public:
  HostBlock(Order order, uint32_t seed)
      : order_(order), random_(seed), lanes_(lane_count), observed_(threads_per_block) {}

  // Shared memory holds anything when a block starts; a lane that is read before it is written gives NaN.
  void start() {
    const double nan = std::numeric_limits<double>::quiet_NaN();
    std::fill(lanes_.begin(), lanes_.end(), Sums{nan, nan});
    std::fill(observed_.begin(), observed_.end(), ChunkStatistics{nan, nan, nan, nan, nan, nan});
  }

  Sums* lanes() { return lanes_.data(); }
  ChunkStatistics* chunk_statistics() { return observed_.data(); }

  template <class Phase>
  void each(Phase phase) {
    if (order_ == Order::shuffled || threads_.empty()) threads_ = ordered(threads_per_block, order_, random_);
    for (const uint32_t thread : threads_) {
      running_thread = static_cast<int>(thread);
      phase(running_thread);
    }
  }

  template <class Phase>
  void alone(Phase phase) {
    running_thread = 0;
    phase();
  }

  // Registers hold anything at first.
  template <class State, class First, class Second>
  void in_fours(First first, Second second) {
    static_assert(std::is_trivially_copyable_v<State>);
    std::vector<State> states(threads_per_block);
    std::memset(static_cast<void*>(states.data()), 0xa5, states.size() * sizeof(State));
    uint32_t largest[threads_per_block];
    each([&](int thread) { largest[thread] = first(thread, states[static_cast<std::size_t>(thread)]); });
    each([&](int thread) {
      const uint32_t* const four = largest + thread / 4 * 4;
      second(thread, states[static_cast<std::size_t>(thread)], *std::max_element(four, four + 4));
    });
  }

  bool arrives_last(uint32_t* counter, uint32_t expected) {
    const bool last = ++*counter == expected;
    if (last) *counter = 0;
    return last;
  }

 private:
  Order order_;
  std::mt19937 random_;
  std::vector<Sums> lanes_;
  std::vector<ChunkStatistics> observed_;
  std::vector<uint32_t> threads_;
};

// One launch: every block of the grid, in any order.
template <class Rule, ThresholdPass threshold_pass, Storage storage, class Forms = AnyForms>
void launch(const TableView& table, const Step& step, uint32_t chunks, Order order, uint32_t seed) {
  std::mt19937 random(seed);
  HostBlock block(order, seed + 1);
  for (const uint32_t chunk : ordered(chunks, order, random)) {
    running_chunk = chunk;
    block.start();
    run_block<Rule, threshold_pass, storage, Forms>(block, table, step, chunk);
  }
}

}  // namespace signadam::host
