// Builds the tensor table of one launch and brings it up to date with each step.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "block.h"

namespace signadam {

class HostTable {
 public:
  // A row of scalars per (group, t) when `rows_by_step`, otherwise per group.
  explicit HostTable(bool rows_by_step) : rows_by_step_(rows_by_step) {}

  // `slot`: the index of the tensor's gradient in what `begin` gets. `step`: address of its fp32 step count, or null.
  // `seed`, `number`: with the step, what the tensor's random bits are made of.
  void add(const TensorEntry& entry, float* step, uint32_t group, std::size_t slot, uint64_t seed, uint32_t number);

  // Chunks are numbered here; nothing may be added afterwards. `gathers`: allocate what statistics need on the host.
  void finish(bool statistics);

  // Takes this step's gradients and returns the rows of scalars it needs, each (group, t).
  std::vector<std::pair<uint32_t, int64_t>> begin(const std::vector<void*>& grads);

  // Counts the step for every tensor that took part.
  void commit();

  std::size_t size() const { return tensors_.size(); }
  uint32_t chunks() const { return chunks_; }
  const std::vector<TensorEntry>& tensors() const { return tensors_; }
  std::vector<uint32_t> tensor_of_chunk() const;  // for a device; 4 bytes for every 16384 elements are not kept here
  const std::vector<const void*>& grads() const { return grads_; }
  const std::vector<Noise>& noise() const { return noise_; }  // empty when all tensors are plain
  Storage storage() const { return plain_ ? Storage::plain : Storage::any; }
  const std::vector<uint32_t>& rows() const { return rows_; }

  void run_cpu(RuleIndex rule, Statistics statistics, const std::vector<Scalars>& scalars, int threads,
               Observed* observed);

 private:
  TableView view(Observed* observed) { return {tensors_.data(), nullptr, sums_.data(), nullptr, observed}; }

  bool rows_by_step_;
  std::vector<TensorEntry> tensors_;
  std::vector<float*> steps_;
  std::vector<uint32_t> groups_;
  std::vector<std::size_t> slots_;
  std::vector<uint32_t> units_;
  uint32_t chunks_ = 0;
  std::vector<std::pair<uint64_t, uint32_t>> seeds_;
  std::vector<const void*> grads_;
  std::vector<Noise> noise_;
  bool plain_ = true;
  std::vector<uint32_t> rows_;
  std::vector<Sums> sums_;
};

}  // namespace signadam
