#include "step.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "pool.h"

namespace signadam::cpu {
namespace {

const Kernels& choose() {
  std::vector<const Kernels*> usable{&portable_kernels};
  std::vector<const char*> unusable;
#if defined(__x86_64__)
  const auto offer = [&](const Kernels& kernels, bool runs) {
    if (runs)
      usable.push_back(&kernels);
    else
      unusable.push_back(kernels.name);
  };
  offer(avx2_kernels, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c"));
  offer(avx512_kernels, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                            __builtin_cpu_supports("f16c"));
#endif
  const char* wanted = std::getenv("SIGNADAM_CPU_CAPABILITY");
  if (wanted == nullptr || *wanted == '\0') return *usable.back();
  std::string names;
  for (const Kernels* kernels : usable) {
    if (std::string(wanted) == kernels->name) return *kernels;
    names += std::string(names.empty() ? "" : ", ") + kernels->name;
  }
  throw std::runtime_error("SIGNADAM_CPU_CAPABILITY=" + std::string(wanted) + ": this processor runs " + names);
}

// What a tensor costs besides its elements, in elements.
constexpr int64_t tensor_cost = 128;

// Elements in a unit: worth waking a thread for, which has gone to sleep while gradients were read and takes a tenth of
// a millisecond or two; as long a run of memory as may be, for short ones cost bandwidth; and few enough that the last
// unit does not keep the others waiting. All units are about as large: a small one at the end would wake a thread too.
int64_t unit_size_for(int64_t elements) {
  constexpr int64_t least = 131072, most = 524288, units = 64;
  int64_t size = elements / units;
  size = size < least ? least : size > most ? most : size;
  const int64_t count = elements / size;
  return count <= 1 ? elements : (elements + count - 1) / count;
}

// Goes before the work and fetches the first lines of each chunk, for the sake of small tensors: they lie apart, and
// end before the processor's own prefetching has begun.
class Scout {
 public:
  // Elements between the chunk that is worked on and the one that is fetched: as many as take longer than memory does.
  static constexpr int64_t lead = 512;

  // Of the chunks up to `end`. `index`: of the tensor that chunk `first` is of.
  Scout(const TableView& table, uint32_t tensors, const Step& step, uint32_t first, uint32_t end, uint32_t index)
      : table_(table), tensors_(tensors), step_(step), chunk_(first), end_(end), index_(index) {}

  // Before chunk `current` is worked on.
  void go_before(uint32_t current) {
    while (chunk_ < end_ && (chunk_ <= current + 1 || elements_ < lead)) {
      while (index_ + 1 < tensors_ && table_.tensors[index_ + 1].first_chunk <= chunk_) ++index_;
      const TensorEntry& tensor = table_.tensors[index_];
      const int64_t begin = static_cast<int64_t>(chunk_ - tensor.first_chunk) * chunk_size;
      const int64_t left = tensor.numel - begin, count = left < chunk_size ? left : chunk_size;
      if (const void* const grad = step_.grads[index_]; grad != nullptr) fetch(tensor, grad, begin, count);
      elements_ += count;
      ++chunk_;
    }
  }
  // Chunk by chunk, behind `go_before`.
  void done(int64_t count) { elements_ -= count; }

 private:
  static void fetch(const TensorEntry& tensor, const void* grad, int64_t begin, int64_t count) {
    constexpr int64_t reach = 256, line = 64;
    const auto lines = [&](const void* base, Format format) {
      if (base == nullptr) return;
      const char* const from = static_cast<const char*>(base) + bytes_before(format, begin);
      for (int64_t at = 0; at < reach && at < bytes_before(format, count); at += line) __builtin_prefetch(from + at);
    };
    const Formats& formats = tensor.formats;
    lines(tensor.param, formats.param);
    lines(grad, formats.grad);
    lines(tensor.exp_avg, formats.exp_avg);
    lines(tensor.exp_avg_sq, formats.exp_avg_sq);
    lines(tensor.aux, formats.aux);
  }

  const TableView& table_;
  uint32_t tensors_;
  const Step& step_;
  uint32_t chunk_, end_, index_;
  int64_t elements_ = 0;  // fetched, and not yet done
};

// The tensor that a chunk is of: the last to begin at it or before. A tensor without elements begins where the next
// does.
uint32_t tensor_of(const TensorEntry* begin, const TensorEntry* end, uint32_t chunk) {
  const auto after = [](uint32_t chunk, const TensorEntry& tensor) { return chunk < tensor.first_chunk; };
  return static_cast<uint32_t>(std::upper_bound(begin, end, chunk, after) - begin) - 1;
}

// The sum of `count` sums, which it overwrites: they go through the chunk procedure until one is left.
Sums total_of(Sums* sums, int64_t count, Sums* lanes) {
  for (; count > 1; count = chunks_of(count)) {
    for (int64_t k = 0; k < chunks_of(count); ++k) {
      const int64_t left = count - k * chunk_size;
      const int64_t width = lanes_for(count);
      for (int64_t lane = 0; lane < width; ++lane)
        lanes[lane] = lane_of_sums(sums + k * chunk_size, left < chunk_size ? left : chunk_size, lane);
      for (int64_t h = width / 2; h >= 1; h /= 2)
        for (int64_t i = 0; i < h; ++i) add(lanes[i], lanes[i + h]);
      sums[k] = lanes[0];
    }
  }
  return sums[0];
}

void finish_statistics(const TableView& table, const TensorEntry& tensor, const Scalars& s, Sums* lanes) {
  const Sums total = total_of(table.sums + tensor.first_chunk, chunks_of(tensor.numel), lanes);
  double& state = *tensor.threshold_state;
  state = s.clips    ? next_norm(state, total)
          : s.scales ? next_scale(state, total, tensor.numel, s)
                     : next_threshold_state(state, total, tensor.numel, s);
}

// `body(chunk, slice, index)` for the chunks of every tensor, the index-th, that has a gradient.
template <class Body>
void for_chunks(const TableView& table, uint32_t tensors, const Step& step, const std::vector<uint32_t>& units,
                int threads, Body body) {
  parallel_for(static_cast<int64_t>(units.size()) - 1, threads, [&](int64_t unit) {
    uint32_t index = tensor_of(table.tensors, table.tensors + tensors, units[unit]);
    const uint32_t end = units[unit + 1];
    Scout scout(table, tensors, step, units[unit], end, index);
    for (uint32_t chunk = units[unit]; chunk < end; ++chunk) {
      while (index + 1 < tensors && table.tensors[index + 1].first_chunk <= chunk) ++index;
      scout.go_before(chunk);
      const Slice slice = slice_of(table, step, chunk, index);
      if (slice.grad != nullptr) body(chunk, slice, index);
      scout.done(slice.count);
    }
  });
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

std::vector<uint32_t> make_units(const TableView& table, uint32_t tensors, uint32_t chunks) {
  int64_t total = 0;
  for (uint32_t i = 0; i < tensors; ++i) total += table.tensors[i].numel + tensor_cost;
  const int64_t unit_size = unit_size_for(total);
  std::vector<uint32_t> units{0};
  int64_t elements = 0;
  for (uint32_t i = 0; i < tensors; ++i) {
    const TensorEntry& tensor = table.tensors[i];
    elements += tensor_cost;
    for (int64_t begin = 0; begin < tensor.numel; begin += chunk_size) {
      const int64_t left = tensor.numel - begin;
      elements += left < chunk_size ? left : chunk_size;
      if (elements >= unit_size) {
        units.push_back(tensor.first_chunk + static_cast<uint32_t>(begin / chunk_size) + 1);
        elements = 0;
      }
    }
  }
  if (units.back() != chunks) units.push_back(chunks);
  return units;
}

void run(RuleIndex rule, ThresholdPass threshold_pass, const TableView& table, uint32_t tensors, const Step& step,
         const std::vector<uint32_t>& units, int threads, Sums* lanes) {
  const Kernels& isa = kernels();
  const auto each_chunk = [&](auto&& body) {
    for_chunks(table, tensors, step, units, threads, [&](uint32_t chunk, const Slice& slice, uint32_t index) {
      body(chunk, slice, step.scalars[step.scalar_indices[index]]);
    });
  };
  const auto finish = [&] {
    parallel_for(1, 1, [&](int64_t) {
      for (uint32_t i = 0; i < tensors; ++i)
        if (step.grads[i] != nullptr && table.tensors[i].numel > 0)
          finish_statistics(table, table.tensors[i], step.scalars[step.scalar_indices[i]], lanes);
    });
  };

  const auto sum = [&](const Slice& slice, const Scalars& s, float alpha) {
    return s.scales || s.clips ? isa.sum_step[rule](slice, s) : isa.sum(slice, s, alpha);
  };

  if (threshold_pass == ThresholdPass::pass_before) {
    each_chunk([&](uint32_t chunk, const Slice& slice, const Scalars& s) { table.sums[chunk] = sum(slice, s, 0.0f); });
    finish();
  }
  each_chunk([&](uint32_t chunk, const Slice& slice, const Scalars& s) {
    // The sums come first: they need the old parameter, and leave the chunk in the cache for the update.
    const float alpha = s.scales ? update_scale(*slice.tensor.threshold_state, s) : threshold(slice.tensor, s);
    if (threshold_pass == ThresholdPass::same_pass) table.sums[chunk] = sum(slice, s, alpha);
    isa.update[rule](slice, s, alpha, table.chunk_statistics == nullptr ? nullptr : table.chunk_statistics + chunk);
  });
  if (threshold_pass == ThresholdPass::same_pass) finish();
}

std::vector<double> squares(const TableView& table, uint32_t tensors, uint32_t chunks, const void* const* grads,
                            const std::vector<uint32_t>& units, int threads) {
  const Kernels& isa = kernels();
  Scalars as_it_is{};
  as_it_is.gradient_scale = 1.0f;
  std::vector<Sums> sums(chunks), lanes(lane_count);
  for_chunks(table, tensors, {grads, nullptr, nullptr, nullptr}, units, threads,
             [&](uint32_t chunk, const Slice& slice, uint32_t) { sums[chunk] = isa.sum(slice, as_it_is, 0.0f); });
  std::vector<double> found(tensors);
  for (uint32_t i = 0; i < tensors; ++i)
    if (const int64_t count = chunks_of(table.tensors[i].numel); grads[i] != nullptr && count > 0)
      found[i] = total_of(sums.data() + table.tensors[i].first_chunk, count, lanes.data()).second;
  return found;
}

double ordered_sum(const std::vector<double>& x) {
  std::vector<Sums> sums, lanes(lane_count);
  for (const double each : x) sums.push_back({0.0, each});
  return sums.empty() ? 0.0 : total_of(sums.data(), static_cast<int64_t>(sums.size()), lanes.data()).second;
}

}  // namespace signadam::cpu
