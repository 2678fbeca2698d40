// The tensors of one launch as one table: what stays (addresses, sizes, formats, chunks) and what each step brings
// (gradient addresses, scalars). Plain data, the same on host and device.
#pragma once

#include "formats.h"
#include "random.h"
#include "scalars.h"

namespace signadam {

// A chunk is the unit of work of a block and of the confidence statistics: 8 rows of 2048 lanes (docs/numerics.md,
// statistics of a gradient). Its size in bytes is a multiple of 16 for every format, so all chunks of a tensor are
// aligned alike.
constexpr int64_t lane_count = 2048;
constexpr int64_t row_count = 8;
constexpr int64_t chunk_size = lane_count * row_count;

SIGNADAM_HD constexpr int64_t chunks_of(int64_t count) { return (count + chunk_size - 1) / chunk_size; }

// S1 and S2 of a chunk's gradient; where a threshold is steered, S1 counts the entries that pass it.
struct Sums {
  double first, second;
};

// Of a chunk, or of some of its elements: entries that pass the gate, the sum of all squares and of theirs, entries of
// the momentum that change their sign, the sum of its magnitudes; and the threshold.
#define SIGNADAM_CHUNK_STATISTICS(X) X(passed) X(squares) X(passed_squares) X(flips) X(magnitude) X(threshold)
struct ChunkStatistics {
#define SIGNADAM_FIELD(name) double name;
  SIGNADAM_CHUNK_STATISTICS(SIGNADAM_FIELD)
#undef SIGNADAM_FIELD
};

// How a tensor and what goes with it are stored.
struct Formats {
  Format param, grad, exp_avg, exp_avg_sq, aux;
  ParamStorage param_storage;

  // fp32 moments and a parameter rounded to nearest: no random bits, nothing packed, nothing beside the parameter.
  SIGNADAM_HD constexpr bool plain() const {
    return exp_avg == Format::fp32 && exp_avg_sq == Format::fp32 && aux == Format::fp32 &&
           param_storage == ParamStorage::nearest;
  }
  SIGNADAM_HD bool packed() const { return is_packed(exp_avg) || is_packed(exp_avg_sq); }

  bool operator==(const Formats& other) const {
    return param == other.param && grad == other.grad && exp_avg == other.exp_avg && exp_avg_sq == other.exp_avg_sq &&
           aux == other.aux && param_storage == other.param_storage;
  }
};

// Where the elements of a part of a tensor lie in the whole, row by row: runs of elements side by side, `stride` apart,
// and so many runs `outer_stride` apart. run == 0: the part is one run; count == 0: there is one level.
struct ShardRuns {
  int64_t run, stride, count, outer_stride;

  SIGNADAM_HD int64_t place(int64_t index) const {
    const int64_t number = index / run, within = index % run;
    return count == 0 ? number * stride + within : number / count * outer_stride + number % count * stride + within;
  }
};

struct TensorEntry {
  void* param;
  void* exp_avg;
  void* exp_avg_sq;
  void* aux;                // a third moment, or the variance of the gradient; of rules that have one, otherwise null
  double* threshold_state;  // the deviation or threshold that confidence keeps between steps, otherwise null
  int64_t numel;
  uint32_t first_chunk;
  Formats formats;
  uint8_t head;          // elements of the parameter before its first 16-byte boundary; 0 where a moment is packed
  void* residual;        // split16: int16; split8: int8; master: fp32; otherwise null
  int64_t shard_offset;  // index of the first element in the unsharded tensor, for random bits
  ShardRuns runs;        // of the others; on the CPU alone

  SIGNADAM_HD bool plain() const { return formats.plain() && aux == nullptr; }
};

// What a step adds. `grads[i] == nullptr`: tensor i takes no part. `scalar_indices[i]` numbers its scalars. `rng_keys`
// is null where all tensors are plain.
struct Step {
  const void* const* grads;
  const RngKey* rng_keys;
  const uint32_t* scalar_indices;
  const Scalars* scalars;
  uint32_t rule = 0;  // of kernels for any rule: its index
};

// Everything a chunk's work needs, on whichever side it runs.
struct TableView {
  const TensorEntry* tensors;
  const uint32_t* tensor_of_chunk;  // null on the host, which goes through chunks in order
  Sums* sums;                       // of a threshold's sums, one per chunk; null where none are taken
  uint32_t* arrivals;               // one per tensor, zero between launches; the device counts finished chunks with it
  ChunkStatistics* chunk_statistics;  // one per chunk; null unless they are asked for
};

// The part of a tensor that one chunk covers.
struct Slice {
  TensorEntry tensor;
  const void* grad;
  RngKey rng_keys;
  int64_t begin;
  int count;
};

SIGNADAM_HD Slice slice_of(const TableView& table, const Step& step, uint32_t chunk, uint32_t index) {
  Slice slice;
  slice.tensor = table.tensors[index];
  slice.grad = step.grads[index];
  slice.rng_keys = step.rng_keys == nullptr ? RngKey{0, 0} : step.rng_keys[index];
  slice.begin = static_cast<int64_t>(chunk - slice.tensor.first_chunk) * chunk_size;
  const int64_t left = slice.tensor.numel - slice.begin;
  slice.count = static_cast<int>(left < chunk_size ? left : chunk_size);
  return slice;
}

SIGNADAM_HD Slice slice_of(const TableView& table, const Step& step, uint32_t chunk) {
  return slice_of(table, step, chunk, table.tensor_of_chunk[chunk]);
}

// The gate of this step: fixed, or alpha times the running deviation [SA, Sec. 6.3] or 1 times the threshold that is
// steered, in double, rounded once.
SIGNADAM_HD float threshold(const TensorEntry& tensor, const Scalars& s) {
  return tensor.threshold_state == nullptr ? s.alpha : static_cast<float>(s.adaptive_alpha * *tensor.threshold_state);
}

// A share of entries or a root mean square below this counts as this.
constexpr double least_scale = 0x1p-10;

// With `scales`, what steps are multiplied by, rounded once: 1 over the share of entries that agree [CO], or the
// parameter's root mean square. Before the first step there is none.
SIGNADAM_HD float update_scale(double state, const Scalars& s) {
  const double size = state < least_scale ? least_scale : state;
  return static_cast<float>(!s.caution ? size : state == 0.0 ? 1.0 : 1.0 / size);
}

}  // namespace signadam
