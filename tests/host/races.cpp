// Runs csrc/block.h with threads that are really concurrent, under ThreadSanitizer: two threads that touch the same
// bytes without a barrier between them, or blocks without the count of arrivals between them, are found whatever the
// timing. Few operating-system threads share the 256 of a block, neighbours never on the same one.
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <thread>

#include "host_block.h"

namespace signadam::host {
namespace {

// Three, because everything in a block is in powers of two: i and i + h never fall to one worker.
constexpr uint32_t workers = 3;

class Barrier {
 public:
  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    const uint32_t round = round_;
    if (++waiting_ == workers) {
      waiting_ = 0;
      ++round_;
      all_.notify_all();
    } else {
      all_.wait(lock, [&] { return round_ != round; });
    }
  }

 private:
  std::mutex mutex_;
  std::condition_variable all_;
  uint32_t waiting_ = 0, round_ = 0;
};

// What the threads of a block share.
struct Shared {
  Barrier barrier;
  std::vector<Sums> lanes = std::vector<Sums>(lane_count);
  bool last = false;
};

// A block as one of its workers sees it; the counterpart of DeviceBlock in csrc/cuda/step.cu.
struct WorkerBlock {
  Shared& shared;
  uint32_t worker;

  Sums* lanes() const { return shared.lanes.data(); }

  template <class Phase>
  void each(Phase phase) {
    for (uint32_t thread = worker; thread < threads_per_block; thread += workers) phase(static_cast<int>(thread));
    shared.barrier.wait();
  }

  bool arrives_last(uint32_t* counter, uint32_t expected) {
    if (worker == 0) {
      shared.last = __atomic_fetch_add(counter, 1u, __ATOMIC_ACQ_REL) == expected - 1;
      if (shared.last) *counter = 0;
    }
    shared.barrier.wait();
    return shared.last;
  }
};

// Two blocks at a time take the chunks, one from either end.
template <class Rule, Statistics statistics>
void concurrent_launch(const TableView& table, const Step& step, uint32_t chunks) {
  Shared shared[2];
  std::vector<std::thread> threads;
  for (uint32_t side = 0; side < 2; ++side)
    for (uint32_t worker = 0; worker < workers; ++worker)
      threads.emplace_back([&, side, worker] {
        WorkerBlock block{shared[side], worker};
        for (uint32_t k = side; k < chunks; k += 2) {
          run_block<Rule, statistics>(block, table, step, side == 0 ? k / 2 : chunks - 1 - k / 2);
          // Blocks begin one after another; this is not a barrier of the block.
          shared[side].barrier.wait();
        }
      });
  for (std::thread& thread : threads) thread.join();
}

struct Spec {
  int64_t numel;
  Format param, grad;
  int param_offset, grad_offset;  // in elements
};

template <class Rule, Statistics statistics>
void run(const std::vector<Spec>& specs) {
  struct Memory {
    std::vector<unsigned char> param, grad;
    std::vector<float> exp_avg, exp_avg_sq;
    double exp_avg_std = 0.5;
  };
  std::vector<Memory> memory(specs.size());
  std::vector<TensorEntry> tensors;
  std::vector<uint32_t> tensor_of_chunk;
  std::vector<const void*> grads;
  for (std::size_t i = 0; i < specs.size(); ++i) {
    const Spec& spec = specs[i];
    Memory& m = memory[i];
    m.param.resize(static_cast<std::size_t>((spec.numel + 8) * size_of(spec.param)));
    m.grad.resize(static_cast<std::size_t>((spec.numel + 8) * size_of(spec.grad)));
    m.exp_avg.resize(static_cast<std::size_t>(spec.numel));
    m.exp_avg_sq.resize(static_cast<std::size_t>(spec.numel));
    TensorEntry entry{};
    entry.param = m.param.data() + spec.param_offset * size_of(spec.param);
    entry.exp_avg = m.exp_avg.data();
    entry.exp_avg_sq = m.exp_avg_sq.data();
    entry.exp_avg_std = statistics == Statistics::none ? nullptr : &m.exp_avg_std;
    entry.numel = spec.numel;
    entry.first_chunk = static_cast<uint32_t>(tensor_of_chunk.size());
    entry.param_format = spec.param;
    entry.grad_format = spec.grad;
    entry.head = head_of(entry.param, spec.param);
    tensors.push_back(entry);
    grads.push_back(m.grad.data() + spec.grad_offset * size_of(spec.grad));
    tensor_of_chunk.insert(tensor_of_chunk.end(), static_cast<std::size_t>(chunks_of(spec.numel)),
                           static_cast<uint32_t>(i));
  }
  std::vector<Sums> sums(tensor_of_chunk.size());
  std::vector<uint32_t> arrivals(specs.size(), 0), rows(specs.size(), 0);
  Scalars s{};
  s.decay = 1.0f, s.denominator = 1.0f, s.coupled = 1, s.confidence_beta = 0.5;
  const TableView table{tensors.data(), tensor_of_chunk.data(), sums.data(), arrivals.data()};
  const auto chunks = static_cast<uint32_t>(tensor_of_chunk.size());
  concurrent_launch<Rule, statistics>(table, {grads.data(), rows.data(), &s}, chunks);
  for (const Memory& m : memory)
    if (statistics != Statistics::none && m.exp_avg_std != 0.25) {
      std::printf("FAILED: a deviation was moved other than once: %g\n", m.exp_avg_std);
      std::exit(1);
    }
}

}  // namespace
}  // namespace signadam::host

int main() {
  using namespace signadam;
  using namespace signadam::host;
  const std::vector<Spec> specs = {
      {3 * 16384 + 2057, Format::fp32, Format::bf16, 1, 0},
      {20, Format::bf16, Format::bf16, 3, 3},
      {16384, Format::bf16, Format::fp32, 0, 1},
      {16384 + 9, Format::fp16, Format::fp16, 5, 2},
      {4099, Format::fp32, Format::fp32, 3, 3},
  };
  run<SignAdam, Statistics::none>(specs);
  run<SignAdamPP, Statistics::gather>(specs);
  run<SignAdamPP, Statistics::only>(specs);
  std::printf("no races\n");
  return 0;
}
