#include "host_table.h"

#include <algorithm>
#include <limits>
#include <map>
#include <stdexcept>

#include "../core/threshold.h"
#include "../cpu/step.h"

namespace signadam {
namespace {

// Of numbers that an int64_t holds; std::floor is a call where the compiler may not use SSE 4.1.
bool is_whole(double x) { return static_cast<double>(static_cast<int64_t>(x)) == x; }

}  // namespace

void HostTable::add(const TensorEntry& entry, StepCount step, uint32_t group, std::size_t index, uint64_t seed,
                    uint32_t param_id) {
  const int64_t chunks = chunks_of(entry.numel);
  const int64_t first = chunks_;
  if (first + chunks > std::numeric_limits<int32_t>::max())
    throw std::length_error("more than 2^31 chunks of 16384 elements in one launch");
  tensors_.push_back(entry);
  tensors_.back().first_chunk = static_cast<uint32_t>(first);
  chunks_ += static_cast<uint32_t>(chunks);
  most_chunks_ = std::max(most_chunks_, chunks);
  steps_.push_back(step);
  groups_.push_back(group);
  indices_.push_back(index);
  seeds_.emplace_back(seed, param_id);
  plain_ = plain_ && entry.plain();
  alike_ = alike_ && entry.formats == tensors_.front().formats;
}

void HostTable::finish(bool sums) {
  grads_.assign(tensors_.size(), nullptr);
  scalar_indices_.assign(tensors_.size(), 0);
  if (!plain_) rng_keys_.assign(tensors_.size(), RngKey{0, 0});
  if (sums) {
    sums_.resize(chunks_);
    lanes_.resize(static_cast<std::size_t>(lanes_for(most_chunks_)));
  }
  units_ = cpu::make_units(view(nullptr), static_cast<uint32_t>(tensors_.size()), chunks());
  // Nothing grows any more.
  tensors_.shrink_to_fit();
  steps_.shrink_to_fit();
  groups_.shrink_to_fit();
  indices_.shrink_to_fit();
  seeds_.shrink_to_fit();
  units_.shrink_to_fit();
}

std::vector<uint32_t> HostTable::tensor_of_chunk() const {
  std::vector<uint32_t> tensor_of_chunk;
  tensor_of_chunk.reserve(chunks_);
  for (std::size_t i = 0; i < tensors_.size(); ++i)
    tensor_of_chunk.insert(tensor_of_chunk.end(), static_cast<std::size_t>(chunks_of(tensors_[i].numel)),
                           static_cast<uint32_t>(i));
  return tensor_of_chunk;
}

std::vector<std::pair<uint32_t, int64_t>> HostTable::begin(const std::vector<void*>& grads) {
  using ScalarSet = std::pair<uint32_t, int64_t>;
  std::vector<ScalarSet> sets;
  std::map<ScalarSet, uint32_t> index_of;
  uint32_t latest = 0;  // neighbours mostly share a set
  for (std::size_t i = 0; i < tensors_.size(); ++i) {
    grads_[i] = grads.at(indices_[i]);
    if (grads_[i] == nullptr) continue;
    int64_t t = 0;
    if (steps_[i].address != nullptr) {
      const double count = steps_[i].value();
      if (!(count >= 0 && count < steps_[i].limit() && is_whole(count))) throw BadStepCount{indices_[i], count};
      t = static_cast<int64_t>(count) + 1;
    }
    if (!plain_) rng_keys_[i] = RngKey::of(seeds_[i].first, seeds_[i].second, static_cast<uint64_t>(t));
    const ScalarSet set{groups_[i], scalars_by_step_ ? t : 0};
    if (sets.empty() || sets[latest] != set) {
      const auto [found, added] = index_of.try_emplace(set, static_cast<uint32_t>(sets.size()));
      if (added) sets.push_back(set);
      latest = found->second;
    }
    scalar_indices_[i] = latest;
  }
  return sets;
}

void HostTable::commit() {
  for (std::size_t i = 0; i < tensors_.size(); ++i)
    if (grads_[i] != nullptr && steps_[i].address != nullptr) steps_[i].increment();
}

void HostTable::run_cpu(RuleIndex rule, ThresholdPass threshold_pass, const std::vector<Scalars>& scalars, int threads,
                        ChunkStatistics* chunk_statistics) {
  cpu::run(rule, threshold_pass, view(chunk_statistics), static_cast<uint32_t>(tensors_.size()),
           {grads_.data(), plain_ ? nullptr : rng_keys_.data(), scalar_indices_.data(), scalars.data()}, units_,
           threads, lanes_.data());
}

std::vector<double> HostTable::squares(int threads) {
  return cpu::squares(view(nullptr), static_cast<uint32_t>(tensors_.size()), chunks_, grads_.data(), units_, threads);
}

}  // namespace signadam
