// Runs csrc/block/block.h with threads that are really concurrent, under ThreadSanitizer: two threads that touch the
// same bytes without a barrier between them, or blocks without the count of arrivals between them, are found whatever
// the timing. Few operating-system threads share the 256 of a block, neighbours never on the same one.
#include <array>
#include <atomic>
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
  std::vector<ChunkStatistics> chunk_statistics = std::vector<ChunkStatistics>(threads_per_block);
  bool last = false;
  // Of each round of four neighbours in a chunk: how often a thread of theirs has arrived, and what it brought.
  static constexpr uint32_t rounds = chunk_size / lane_count;
  std::array<std::array<std::atomic<uint32_t>, threads_per_block / 4>, rounds> arrived{};
  uint32_t largest[rounds][threads_per_block] = {};
};

// A block as one of its workers sees it; the counterpart of DeviceBlock in csrc/cuda/step.cu.
struct WorkerBlock {
  Shared& shared;
  uint32_t worker;
  uint32_t round = 0;  // of fours, in this chunk

  WorkerBlock(Shared& block, uint32_t number) : shared(block), worker(number) {}

  Sums* lanes() const { return shared.lanes.data(); }
  ChunkStatistics* chunk_statistics() const { return shared.chunk_statistics.data(); }

  template <class Phase>
  void each(Phase phase) {
    for (uint32_t thread = worker; thread < threads_per_block; thread += workers) phase(static_cast<int>(thread));
    shared.barrier.wait();
  }

  template <class Phase>
  void alone(Phase phase) {
    if (worker == 0) phase();
  }

  // The four wait for each other and for nobody else. Chunks are apart by a barrier, so places serve one after another;
  // counts go on, for not every chunk comes here.
  template <class State, class First, class Second>
  void in_fours(First first, Second second) {
    std::vector<State> states(threads_per_block);
    auto& arrived = shared.arrived.at(round);
    auto& largest = shared.largest[round];
    const uint32_t begun = ++begun_.at(round);
    ++round;
    for (uint32_t thread = worker; thread < threads_per_block; thread += workers) {
      largest[thread] = first(static_cast<int>(thread), states[thread]);
      arrived[thread / 4].fetch_add(1, std::memory_order_release);
    }
    for (uint32_t thread = worker; thread < threads_per_block; thread += workers) {
      const uint32_t four = thread / 4;
      while (arrived[four].load(std::memory_order_acquire) < 4 * begun) std::this_thread::yield();
      second(static_cast<int>(thread), states[thread], *std::max_element(largest + 4 * four, largest + 4 * four + 4));
    }
  }

  bool arrives_last(uint32_t* counter, uint32_t expected) {
    if (worker == 0) {
      shared.last = __atomic_fetch_add(counter, 1u, __ATOMIC_ACQ_REL) == expected - 1;
      if (shared.last) *counter = 0;
    }
    shared.barrier.wait();
    return shared.last;
  }

 private:
  std::array<uint32_t, Shared::rounds> begun_{};
};

// Two blocks at a time take the chunks, one from either end.
template <class Rule, ThresholdPass threshold_pass, Storage storage>
void concurrent_launch(const TableView& table, const Step& step, uint32_t chunks) {
  Shared shared[2];
  std::vector<std::thread> threads;
  for (uint32_t side = 0; side < 2; ++side)
    for (uint32_t worker = 0; worker < workers; ++worker)
      threads.emplace_back([&, side, worker] {
        WorkerBlock block(shared[side], worker);
        for (uint32_t k = side; k < chunks; k += 2) {
          block.round = 0;
          run_block<Rule, threshold_pass, storage, AnyForms>(block, table, step,
                                                             side == 0 ? k / 2 : chunks - 1 - k / 2);
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
  Format exp_avg = Format::fp32, exp_avg_sq = Format::fp32;
  ParamStorage param_storage = ParamStorage::nearest;
};

template <class Rule, ThresholdPass threshold_pass, Storage storage>
void run(const std::vector<Spec>& specs) {
  struct Memory {
    std::vector<unsigned char> param, grad, exp_avg, exp_avg_sq, aux, residual;
    double threshold_state = 0.5;
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
    // Room for exponents behind the codes, whether there are any or not.
    const auto padded = static_cast<std::size_t>((spec.numel + packed_run - 1) / packed_run * packed_run);
    m.exp_avg.resize(4 * padded + padded / packed_run);
    m.exp_avg_sq.resize(4 * padded);
    m.aux.resize(4 * padded);
    m.residual.resize(4 * padded);
    TensorEntry entry{};
    entry.param = m.param.data() + spec.param_offset * size_of(spec.param);
    entry.exp_avg = m.exp_avg.data();
    entry.exp_avg_sq = m.exp_avg_sq.data();
    entry.aux = has_third<Rule> ? m.aux.data() : nullptr;
    entry.threshold_state = threshold_pass == ThresholdPass::none ? nullptr : &m.threshold_state;
    entry.numel = spec.numel;
    entry.first_chunk = static_cast<uint32_t>(tensor_of_chunk.size());
    entry.formats = {spec.param, spec.grad, spec.exp_avg, spec.exp_avg_sq, Format::fp32, spec.param_storage};
    entry.head = entry.formats.packed() ? 0 : head_of(entry.param, spec.param);
    entry.residual = m.residual.data();
    entry.shard_offset = 5;
    tensors.push_back(entry);
    grads.push_back(m.grad.data() + spec.grad_offset * size_of(spec.grad));
    tensor_of_chunk.insert(tensor_of_chunk.end(), static_cast<std::size_t>(chunks_of(spec.numel)),
                           static_cast<uint32_t>(i));
  }
  std::vector<Sums> sums(tensor_of_chunk.size());
  std::vector<ChunkStatistics> chunk_statistics(tensor_of_chunk.size());
  std::vector<uint32_t> arrivals(specs.size(), 0), rows(specs.size(), 0);
  Scalars s{};
  const std::vector<RngKey> rng_keys(specs.size(), RngKey::of(1, 2, 3));
  s.gradient_scale = s.decay = s.denominator = 1.0f, s.coupled = 1, s.confidence_beta = 0.5;
  const TableView table{tensors.data(), tensor_of_chunk.data(), sums.data(), arrivals.data(), chunk_statistics.data()};
  const auto chunks = static_cast<uint32_t>(tensor_of_chunk.size());
  concurrent_launch<Rule, threshold_pass, storage>(table, {grads.data(), rng_keys.data(), rows.data(), &s}, chunks);
  for (const Memory& m : memory)
    if (threshold_pass != ThresholdPass::none && m.threshold_state != 0.25) {
      std::printf("FAILED: a deviation was moved other than once: %g\n", m.threshold_state);
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
  run<SignAdam, ThresholdPass::none, Storage::plain>(specs);
  run<SignAdamPP, ThresholdPass::same_pass, Storage::plain>(specs);
  run<SignAdamPP, ThresholdPass::pass_before, Storage::plain>(specs);

  // Neighbours in a byte, in a word, and under an exponent.
  std::vector<Spec> bounded, unbounded;
  const std::vector<Format> forms = first_forms<SignAdam>();
  const ParamStorage param_storage[] = {ParamStorage::split8, ParamStorage::split16, ParamStorage::master,
                                        ParamStorage::stochastic, ParamStorage::nearest};
  for (int i = 0; i < static_cast<int>(forms.size()); ++i)
    for (const int64_t numel : {20, 2049, 16384 + 9}) {
      const int offset = i * static_cast<int>(numel) % 8;
      bounded.push_back(
          {numel, Format::bf16, Format::bf16, offset, i, forms[i], Format::bf16, param_storage[(i + numel) % 5]});
      unbounded.push_back(bounded.back());
      unbounded.back().exp_avg = is_packed(forms[i]) ? Format::block8 : forms[i];
    }
  run<SignAdam, ThresholdPass::none, Storage::any>(bounded);
  run<Signum, ThresholdPass::none, Storage::any>(unbounded);
  run<SignAdamPP, ThresholdPass::same_pass, Storage::any>(bounded);
  run<SignAdamPP, ThresholdPass::pass_before, Storage::any>(bounded);
  run<AdamAMSGrad, ThresholdPass::none, Storage::any>(specs);
  run<SignAdamPP, ThresholdPass::same_pass, Storage::with_statistics>(bounded);
  run<Signum, ThresholdPass::none, Storage::with_statistics>(unbounded);
  std::printf("no races\n");
  return 0;
}
