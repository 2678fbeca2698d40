// Builds the tensor table of one launch and brings it up to date with each step.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "../block/block.h"

namespace signadam {

// Where the number of steps taken is kept: a double, exact to 2^53, or a float, exact to 2^24, of the functional forms.
struct StepCount {
  void* address = nullptr;  // null where nobody counts
  bool is_double = true;

  double limit() const { return is_double ? 9007199254740992.0 : 16777216.0; }
  double value() const {
    return is_double ? *static_cast<const double*>(address) : *static_cast<const float*>(address);
  }
  void increment() const {
    if (is_double)
      *static_cast<double*>(address) += 1;
    else
      *static_cast<float*>(address) += 1;
  }
};

// A step count that no training reaches, or that the next step would not change.
struct BadStepCount {
  std::size_t index;
  double count;
};

class HostTable {
 public:
  // A set of scalars per (group, t) when `scalars_by_step`, otherwise per group.
  explicit HostTable(bool scalars_by_step) : scalars_by_step_(scalars_by_step) {}

  // `index`: of the tensor's gradient in what `begin` gets. `step`: its step count. `seed`, `param_id`: with the step,
  // what the tensor's random bits are made of.
  void add(const TensorEntry& entry, StepCount step, uint32_t group, std::size_t index, uint64_t seed,
           uint32_t param_id);

  // Chunks are numbered here; nothing may be added afterwards. `sums`: allocate what sums over gradients need on the
  // host.
  void finish(bool sums);

  // Takes this step's gradients and returns the sets of scalars it needs, each (group, t).
  // Throws BadStepCount; nothing of a tensor has been written then.
  std::vector<std::pair<uint32_t, int64_t>> begin(const std::vector<void*>& grads);

  // Counts the step for every tensor that took part.
  void commit();

  std::size_t size() const { return tensors_.size(); }
  uint32_t chunks() const { return chunks_; }
  const std::vector<TensorEntry>& tensors() const { return tensors_; }
  std::vector<uint32_t> tensor_of_chunk() const;  // for a device; 4 bytes for every 16384 elements are not kept here
  const std::vector<const void*>& grads() const { return grads_; }
  const std::vector<RngKey>& rng_keys() const { return rng_keys_; }  // empty when all tensors are plain
  Storage storage() const { return plain_ ? Storage::plain : Storage::any; }
  const std::vector<uint32_t>& scalar_indices() const { return scalar_indices_; }
  // Of all tensors; null where they differ.
  const Formats* formats() const { return alike_ && !tensors_.empty() ? &tensors_.front().formats : nullptr; }

  void run_cpu(RuleIndex rule, ThresholdPass threshold_pass, const std::vector<Scalars>& scalars, int threads,
               ChunkStatistics* chunk_statistics);

  // The sum of squares of each tensor's gradient of the step that has begun.
  std::vector<double> squares(int threads);

 private:
  TableView view(ChunkStatistics* chunk_statistics) {
    return {tensors_.data(), nullptr, sums_.data(), nullptr, chunk_statistics};
  }

  bool scalars_by_step_;
  std::vector<TensorEntry> tensors_;
  std::vector<StepCount> steps_;
  std::vector<uint32_t> groups_;
  std::vector<std::size_t> indices_;
  std::vector<uint32_t> units_;
  uint32_t chunks_ = 0;
  int64_t most_chunks_ = 0;  // of one tensor
  std::vector<std::pair<uint64_t, uint32_t>> seeds_;
  std::vector<const void*> grads_;
  std::vector<RngKey> rng_keys_;
  bool plain_ = true;
  bool alike_ = true;
  std::vector<uint32_t> scalar_indices_;
  std::vector<Sums> sums_;
  std::vector<Sums> lanes_;  // room to add a tensor's chunks in: a step allocates nothing once it has begun to write
};

}  // namespace signadam
