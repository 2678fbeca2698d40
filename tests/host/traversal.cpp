// Proves, on the host and under sanitizers, that the traversal of csrc/block/block.h touches every element of every
// tensor exactly once and nothing else. Run with the name of a part; prints what it looked at, or what is wrong.
//
// With SIGNADAM_TRACED it is compiled for ThreadSanitizer but linked without it: the functions that every access then
// calls are defined here, and count the accesses to each byte.
//
// With SIGNADAM_QUICK each part takes one kernel of those that share code: under sanitizers each takes seconds to
// compile.
#include <sanitizer/asan_interface.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>

// The table is built as the launchers build it. Of the CPU backend only these three are needed, by name.
#include "../../csrc/cpu/step.h"
#include "../../csrc/python/host_table.cpp"
#include "host_block.h"

namespace signadam::cpu {
std::vector<uint32_t> make_units(const TableView&, uint32_t, uint32_t) { return {}; }
void run(RuleIndex, ThresholdPass, const TableView&, uint32_t, const Step&, const std::vector<uint32_t>&, int, Sums*) {
  std::abort();
}
std::vector<double> squares(const TableView&, uint32_t, uint32_t, const void* const*, const std::vector<uint32_t>&,
                            int) {
  std::abort();
}
}  // namespace signadam::cpu

namespace signadam::host {
namespace {

template <class... Parts>
[[noreturn]] void fail(const char* what, Parts... parts) {
  std::printf("FAILED: ");
  std::printf(what, parts...);
  std::printf("\n");
  std::exit(1);
}

#define REQUIRE(condition, ...)                          \
  do {                                                   \
    if (!(condition)) fail(#condition ": " __VA_ARGS__); \
  } while (0)

constexpr Format formats[] = {Format::fp32, Format::bf16, Format::fp16};

uint32_t bits_at(const void* base, Format format, int64_t i) {
  uint32_t bits = 0;
  std::memcpy(&bits, static_cast<const unsigned char*>(base) + i * size_of(format),
              static_cast<std::size_t>(size_of(format)));
  return bits;
}

float value_at(const void* base, Format format, int64_t i) {
  const uint32_t bits = bits_at(base, format, i);
  return format == Format::fp32 ? float_of(bits) : widen(format, static_cast<uint16_t>(bits));
}

uint32_t stored_bits(Format format, float x) { return format == Format::fp32 ? bits_of(x) : narrow(format, x); }

void set_value(void* base, Format format, int64_t i, float x) {
  const uint32_t bits = stored_bits(format, x);
  std::memcpy(static_cast<unsigned char*>(base) + i * size_of(format), &bits,
              static_cast<std::size_t>(size_of(format)));
}

bool tracing = false;

#if defined(SIGNADAM_TRACED)
// What happened to a byte since the trace began.
struct Accesses {
  uint8_t reads, writes;
  bool several;           // threads
  bool read_after_write;  // by whomever
  uint32_t first;         // thread, counted over all blocks
};

constexpr std::size_t arena_size = std::size_t{1} << 26;
alignas(64) unsigned char arena[arena_size];
Accesses accesses_of[arena_size];
std::size_t arena_used = 0;

__attribute__((no_sanitize("thread"), noinline)) void trace(const void* address, std::size_t size, bool writes) {
  const auto at = reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(arena);
  if (!tracing || at >= arena_size) return;
  const uint32_t thread = running_chunk * threads_per_block + static_cast<uint32_t>(running_thread);
  for (std::size_t i = at; i < at + size; ++i) {
    Accesses& byte = accesses_of[i];
    if (byte.reads + byte.writes == 0) byte.first = thread;
    byte.several = byte.several || byte.first != thread;
    byte.read_after_write = byte.read_after_write || (!writes && byte.writes > 0);
    ++(writes ? byte.writes : byte.reads);
  }
}

using Memory = std::unique_ptr<unsigned char, void (*)(void*)>;
Memory allocate(std::size_t size) {
  unsigned char* const memory = arena + arena_used;
  arena_used += (size + 63) / 64 * 64;
  REQUIRE(arena_used <= arena_size, "%zu", arena_used);
  return {memory, [](void*) {}};
}
#else
using Memory = std::unique_ptr<unsigned char, void (*)(void*)>;
Memory allocate(std::size_t size) { return {static_cast<unsigned char*>(std::malloc(size)), std::free}; }
#endif

// Bytes of a moment, as docs/numerics.md has them: packed codes fill whole runs, and exponents follow them.
std::size_t bytes_of(Format format, int64_t count) {
  const auto n = static_cast<std::size_t>(count), runs = (n + 31) / 32;
  const auto bits = static_cast<std::size_t>(bits_of(format));
  return is_packed(format) ? (32 * bits / 8 + (format == Format::block8 ? 1 : 0)) * runs : n * bits / 8;
}

// A tensor's memory, in an allocation of its own that ends with the last element, so AddressSanitizer sees the first
// byte beyond. Before the first element lie `offset` bytes and a guard: poisoned in whole granules of 8 bytes, and
// filled with a pattern where a granule is shared.
class Buffer {
 public:
  Buffer() = default;
  Buffer(int64_t count, Format format, int offset) : Buffer(bytes_of(format, count), offset) { format_ = format; }
  Buffer(std::size_t bytes, int offset)
      : front_(guard_bytes + static_cast<std::size_t>(offset)), bytes_(bytes), memory_(allocate(front_ + bytes_)) {
    std::memset(memory_.get(), pattern, front_);
    std::memset(memory_.get() + front_, 0, bytes_);
    ASAN_POISON_MEMORY_REGION(memory_.get(), front_ / 8 * 8);
  }

  std::size_t bytes() const { return bytes_; }
  unsigned char* begin() const { return memory_ == nullptr ? nullptr : memory_.get() + front_; }
  Format format() const { return format_; }
  void set(int64_t i, float x) { set_value(begin(), format_, i, x); }
  float get(int64_t i) const { return value_at(begin(), format_, i); }
  uint32_t bits(int64_t i) const { return bits_at(begin(), format_, i); }

  bool guard_intact() const {
    if (memory_ == nullptr) return true;
    ASAN_UNPOISON_MEMORY_REGION(memory_.get(), front_);
    bool intact = true;
    for (std::size_t i = 0; i < front_; ++i) intact = intact && memory_.get()[i] == pattern;
    ASAN_POISON_MEMORY_REGION(memory_.get(), front_ / 8 * 8);
    return intact;
  }

 private:
  static constexpr std::size_t guard_bytes = 64;
  static constexpr unsigned char pattern = 0xa5;
  Format format_ = Format::fp32;
  std::size_t front_ = 0, bytes_ = 0;
  Memory memory_{nullptr, std::free};
};

struct Spec {
  int64_t numel;
  Format param, grad;
  int param_offset, grad_offset, moment_offset;  // in elements, from a 16-byte boundary
  bool present;
  Format exp_avg = Format::fp32, exp_avg_sq = Format::fp32;
  ParamStorage param_storage = ParamStorage::nearest;
  int residual_offset = 0;
  int64_t shard_offset = 0;
};

struct Tensor {
  Spec spec;
  Buffer param, grad, exp_avg, exp_avg_sq, aux, residual;
  std::unique_ptr<double> threshold_state;
  uint32_t group;

  std::vector<const Buffer*> buffers() const { return {&param, &grad, &exp_avg, &exp_avg_sq, &aux, &residual}; }
};

// Which operands a rule has beside parameter and gradient.
struct Uses {
  int moments;
  bool variance;

  template <class Rule>
  static Uses of() {
    return {Rule::moments, Rule::reads_variance};
  }
  bool aux() const { return moments > 2 || variance; }
};

// The storage of tables of plain tensors.
template <class Rule>
constexpr Storage plain_for = has_third<Rule> ? Storage::any : Storage::plain;

int residual_bytes(ParamStorage param_storage) {
  return param_storage == ParamStorage::split8    ? 1
         : param_storage == ParamStorage::split16 ? 2
         : param_storage == ParamStorage::master  ? 4
                                                  : 0;
}

// Tensors of one launch. Moments and deviation exist only where the launch needs them: null otherwise, as in training.
class Model {
 public:
  Model(const std::vector<Spec>& specs, Uses uses, bool adaptive, uint32_t groups)
      : table_(false), arrivals_(specs.size(), 0) {
    for (const Spec& spec : specs) {
      Tensor t{spec, {}, {}, {}, {}, {}, {}, nullptr, static_cast<uint32_t>(tensors_.size()) % groups};
      t.param = Buffer(spec.numel, spec.param, spec.param_offset * size_of(spec.param));
      if (spec.present) t.grad = Buffer(spec.numel, spec.grad, spec.grad_offset * size_of(spec.grad));
      const auto moment = [&](Format format, int offset) {
        return Buffer(spec.numel, format, is_packed(format) ? 0 : offset * size_of(format));
      };
      const Format aux = uses.moments > 2 ? spec.exp_avg_sq : Format::fp32;
      if (uses.moments > 0) t.exp_avg = moment(spec.exp_avg, spec.moment_offset);
      if (uses.moments > 1) t.exp_avg_sq = moment(spec.exp_avg_sq, (spec.moment_offset + 1) % 4);
      if (uses.aux()) t.aux = moment(aux, (spec.moment_offset + 2) % 4);
      if (const int size = residual_bytes(spec.param_storage); size > 0)
        t.residual = Buffer(static_cast<std::size_t>(spec.numel * size), spec.residual_offset * size);
      if (adaptive) t.threshold_state = std::make_unique<double>(0.25);
      TensorEntry entry{};
      entry.param = t.param.begin();
      entry.exp_avg = t.exp_avg.begin();
      entry.exp_avg_sq = t.exp_avg_sq.begin();
      entry.aux = t.aux.begin();
      entry.threshold_state = t.threshold_state.get();
      entry.numel = spec.numel;
      entry.formats = {spec.param,
                       spec.grad,
                       uses.moments > 0 ? spec.exp_avg : Format::fp32,
                       uses.moments > 1 ? spec.exp_avg_sq : Format::fp32,
                       aux,
                       spec.param_storage};
      entry.head = entry.formats.packed() ? 0 : head_of(entry.param, spec.param);
      entry.residual = t.residual.begin();
      entry.shard_offset = spec.shard_offset;
      table_.add(entry, {}, t.group, tensors_.size(), 0x0123456789abcdefu, static_cast<uint32_t>(tensors_.size()));
      tensors_.push_back(std::move(t));
    }
    table_.finish(false);
    const double nan = std::numeric_limits<double>::quiet_NaN();
    sums_.assign(table_.chunks(), {nan, nan});
    observed_.assign(table_.chunks(), {nan, nan, nan, nan, nan, nan});
  }

  std::vector<Tensor>& tensors() { return tensors_; }
  const std::vector<ChunkStatistics>& chunk_statistics() const { return observed_; }
  const std::vector<TensorEntry>& entries() const { return table_.tensors(); }

  // `scalars`: one row per group.
  template <class Rule, ThresholdPass threshold_pass, Storage storage = plain_for<Rule>>
  void run(const std::vector<Scalars>& scalars, Order order) {
    std::vector<void*> grads;
    for (const Tensor& t : tensors_) grads.push_back(t.grad.begin());
    std::vector<Scalars> rows;
    for (const auto& row : table_.begin(grads)) rows.push_back(scalars.at(row.first));
    constexpr bool sums = threshold_pass != ThresholdPass::none;
    const std::vector<uint32_t> tensor_of_chunk = table_.tensor_of_chunk();
    const TableView view{table_.tensors().data(), tensor_of_chunk.data(), sums ? sums_.data() : nullptr,
                         sums ? arrivals_.data() : nullptr,
                         storage == Storage::with_statistics ? observed_.data() : nullptr};
    REQUIRE(table_.storage() == storage || storage == Storage::with_statistics, "there are tensors of another kind");
    const RngKey* const rng_keys = table_.rng_keys().empty() ? nullptr : table_.rng_keys().data();
    const Step step{table_.grads().data(), rng_keys, table_.scalar_indices().data(), rows.data()};
    tracing = true;
    launch<Rule, threshold_pass, storage>(view, step, table_.chunks(), order, 7);
    tracing = false;
    for (const uint32_t count : arrivals_) REQUIRE(count == 0, "arrivals must be back at zero");
    for (std::size_t i = 0; i < tensors_.size(); ++i)
      for (const Buffer* buffer : tensors_[i].buffers())
        REQUIRE(buffer->guard_intact(), "memory before tensor %zu was written", i);
  }

 private:
  std::vector<Tensor> tensors_;
  HostTable table_;
  std::vector<Sums> sums_;
  std::vector<ChunkStatistics> observed_;
  std::vector<uint32_t> arrivals_;
};

// Every pair of formats, every head of the parameter, lengths around every border; gradient and moments misaligned
// otherwise than the parameter, or alike; every seventh gradient absent.
std::vector<Spec> adversarial(int repetitions, bool large) {
  std::vector<Spec> specs;
  std::mt19937 random(3);
  const auto add = [&](int64_t numel, Format param, Format grad, int offset) {
    const int elements = 16 / size_of(param);
    const int grad_offset = random() % 3 == 0 ? offset : static_cast<int>(random() % 8);
    const int moment_offset = random() % 3 == 0 ? 0 : static_cast<int>(random() % 4);
    specs.push_back({numel, param, grad, offset % elements, grad_offset, moment_offset, specs.size() % 7 != 3});
  };
  for (int k = 0; k < repetitions; ++k)
    for (const Format param : formats)
      for (const Format grad : formats)
        for (int offset = 0; offset < 8; ++offset) {
          for (const int64_t numel : {0, 1, 2, 7, 8, 9, 15, 17, 2047, 2048, 2049}) add(numel, param, grad, offset);
          if (k == 0 && large && offset % 3 == 0)
            for (const int64_t numel : {16383, 16384, 16385, 3 * 16384 + 2057}) add(numel, param, grad, offset);
        }
  return specs;
}

// Every form of moments and parameter that a rule of so many moments can have, some plain ones among them, at
// borders of runs, rows and chunks, and across the index at which random keys change.
template <class Rule>
std::vector<Spec> stored_specs(bool large) {
  using Forms = std::vector<Format>;
  const Forms none = {Format::fp32}, wide = {Format::fp32, Format::bf16};
  const std::pair<Format, ParamStorage> params[] = {
      {Format::fp32, ParamStorage::nearest},    {Format::bf16, ParamStorage::nearest},
      {Format::fp16, ParamStorage::nearest},    {Format::bf16, ParamStorage::stochastic},
      {Format::fp16, ParamStorage::stochastic}, {Format::bf16, ParamStorage::split16},
      {Format::bf16, ParamStorage::split8},     {Format::bf16, ParamStorage::master},
      {Format::fp16, ParamStorage::master},
  };
  std::vector<Spec> specs;
  std::mt19937 random(4);
  const auto below = [&](int n) { return static_cast<int>(random() % static_cast<uint32_t>(n)); };
  for (const Format exp_avg : first_forms<Rule>())
    for (const Format exp_avg_sq : Rule::moments > 1 ? wide : none)
      for (const auto& [param, param_storage] : params) {
        std::vector<int64_t> sizes = {0, 1, 7, 8, 9, 31, 32, 33, 255, 2047, 2049};
        if (large && below(3) == 0)
          sizes.push_back(std::vector<int64_t>{16383, 16385, 2 * 16384 + 2057}[specs.size() % 3]);
        for (const int64_t numel : sizes) {
          const int offset = below(3) == 0 ? 0 : below(16 / size_of(param));
          const int64_t index = std::vector<int64_t>{0, 1, 6, (int64_t{1} << 33) - 1001}[specs.size() % 4];
          specs.push_back({numel, param, formats[below(3)], offset, below(2) * below(8), below(2) * below(4),
                           specs.size() % 13 != 7, exp_avg, exp_avg_sq, param_storage, below(3) == 0 ? 0 : below(8),
                           index});
        }
      }
  return specs;
}

// ------------------------------------------------------------------------------------------------------ arithmetic

// One chunk of `count` elements: its pieces tile [0, count) in order, and each lies where the kernel may rely on it.
void check_chunk(int count, int head) {
  const int pieces = pieces_of(count, head);
  int reached = 0;
  for (int index = 0; index < pieces; ++index) {
    const Piece piece = piece_of(index, count, head);
    REQUIRE(piece.begin == reached, "count %d head %d piece %d", count, head, index);
    REQUIRE(piece.count >= 1 && piece.offset >= 0 && piece.offset + piece.count <= piece_size,
            "count %d head %d piece %d", count, head, index);
    // Clipped only by the chunk's ends, and otherwise between borders that are whole pieces from the head.
    REQUIRE((piece.begin - piece.offset - head) % piece_size == 0, "count %d head %d piece %d", count, head, index);
    REQUIRE(piece.offset == 0 || piece.begin == 0, "count %d head %d piece %d", count, head, index);
    REQUIRE(piece.offset + piece.count == piece_size || piece.begin + piece.count == count, "count %d head %d piece %d",
            count, head, index);
    REQUIRE(piece.whole() == (piece.count == piece_size), "count %d head %d piece %d", count, head, index);
    // The owner of the piece sums into lanes that no other thread has.
    for (int i : {piece.offset, piece.offset + piece.count - 1})
      REQUIRE((lane_of(index % threads_per_block, i) + first_border(head) + lane_count) % lane_count ==
                  (piece.begin + i - piece.offset) % lane_count,
              "count %d head %d piece %d", count, head, index);
    reached += piece.count;
  }
  REQUIRE(reached == count, "count %d head %d: %d elements", count, head, reached);
  // A thread looks this far beyond the last piece.
  for (int index = pieces; index < pieces + 2 * threads_per_block; ++index)
    REQUIRE(piece_of(index, count, head).count == 0, "count %d head %d piece %d", count, head, index);
}

void arithmetic() {
  int64_t checked = 0;
  for (int head = 0; head < 8; ++head) {
    const auto check = [&](int count) { check_chunk(count, head), ++checked; };
    for (int count = 1; count <= 2 * lane_count + 20; ++count) check(count);
    for (int count = 2 * lane_count + 21; count < chunk_size - 20; count += 61) check(count);
    for (int count = chunk_size - 20; count <= chunk_size; ++count) check(count);
  }
  // Lanes are owned by one thread each, and have a place each: neighbouring threads neighbouring ones.
  std::vector<int> owners(lane_count, 0), places(lane_count, 0);
  for (int thread = 0; thread < threads_per_block; ++thread)
    for (int i = 0; i < piece_size; ++i) {
      const int lane = lane_of(thread, i);
      ++owners.at(static_cast<std::size_t>(lane)), ++places.at(static_cast<std::size_t>(place_of(lane)));
      REQUIRE(place_of(lane) == place_of(lane_of(0, i)) + thread, "thread %d offset %d", thread, i);
    }
  for (const auto& counts : {owners, places})
    for (const int count : counts) REQUIRE(count == 1, "lanes");

  for (const Format format : formats) {
    // All chunks of a tensor are aligned alike.
    static_assert(chunk_size * 2 % 16 == 0);
    const auto size = static_cast<uintptr_t>(size_of(format));
    for (uintptr_t address = 4096; address < 4096 + 64; ++address) {
      const uint8_t head = head_of(reinterpret_cast<void*>(address), format);
      if (address % size != 0) {
        REQUIRE(head == 0, "address %zu", static_cast<std::size_t>(address));
        continue;
      }
      REQUIRE(head * size < 16 && (address + head * size) % 16 == 0, "address %zu", static_cast<std::size_t>(address));
    }
  }

  // Wide where it may be, narrow where it must: of a parameter always wide, of others by where their pieces begin.
  int64_t wide = 0, narrow = 0;
  for (const Format param : formats)
    for (const Format other : formats)
      for (int p = 0; p < 16 / size_of(param); ++p)
        for (int q = 0; q < 16 / size_of(other); ++q)
          for (const int64_t begin : {int64_t{0}, chunk_size, 5 * chunk_size}) {
            const uintptr_t param_base = (uintptr_t{1} << 40) + static_cast<uintptr_t>(p * size_of(param));
            const uintptr_t other_base = (uintptr_t{1} << 41) + static_cast<uintptr_t>(q * size_of(other));
            Slice slice{};
            slice.begin = begin;
            slice.count = chunk_size;
            slice.tensor.head = head_of(reinterpret_cast<void*>(param_base), param);
            REQUIRE(Operand::of(reinterpret_cast<void*>(param_base), param, slice).aligned, "offset %d", p);
            const Operand operand = Operand::of(reinterpret_cast<void*>(other_base), other, slice);
            bool on_boundary = true;
            for (int index = 0; index < pieces_of(slice.count, slice.tensor.head); ++index) {
              const Piece piece = piece_of(index, slice.count, slice.tensor.head);
              const auto at =
                  reinterpret_cast<uintptr_t>(operand.begin) + static_cast<uintptr_t>(piece.begin * size_of(other));
              if (piece.whole()) on_boundary = on_boundary && at % 16 == 0;
            }
            REQUIRE(operand.aligned == on_boundary, "offsets %d %d", p, q);
            ++(on_boundary ? wide : narrow);
          }
  REQUIRE(wide > 100 && narrow > 100, "%lld %lld", static_cast<long long>(wide), static_cast<long long>(narrow));
  std::printf("%lld chunks tile exactly, %lld wide and %lld narrow operands\n", static_cast<long long>(checked),
              static_cast<long long>(wide), static_cast<long long>(narrow));
}

// ------------------------------------------------------------------------------------------------------------ huge

// Tensors beyond 2^31 elements, by addresses that nobody reads.
void huge() {
  constexpr int64_t numel = 3 * (int64_t{1} << 31) + 5;
  constexpr uint32_t chunks = 3 * (1u << 31 >> 14) + 1;
  static_assert(chunks_of(numel) == chunks);
  constexpr Format moments[] = {Format::int8, Format::int2, Format::block8};
  constexpr ParamStorage param_storage[] = {ParamStorage::nearest, ParamStorage::split8, ParamStorage::master};
  HostTable table(false);
  std::vector<uintptr_t> bases;
  for (std::size_t i = 0; i < 3; ++i) {
    const Format format = formats[i];
    bases.push_back((uintptr_t{1} << 45) * (i + 1) + static_cast<uintptr_t>(size_of(format)));
    TensorEntry entry{};
    entry.param = reinterpret_cast<void*>(bases.back());
    entry.numel = numel;
    entry.formats = {format, Format::fp32, moments[i], Format::fp32, Format::fp32, param_storage[i]};
    entry.exp_avg = reinterpret_cast<void*>(bases.back() << 1);
    entry.residual = reinterpret_cast<void*>(bases.back() << 2);
    entry.head = head_of(entry.param, format);
    table.add(entry, {}, 0, i, 0, 0);
  }
  table.finish(false);
  REQUIRE(table.chunks() == 3 * chunks, "%u", table.chunks());
  std::vector<void*> grads(3, reinterpret_cast<void*>(uintptr_t{4096}));
  table.begin(grads);
  const std::vector<uint32_t> tensor_of_chunk = table.tensor_of_chunk();
  const TableView view{table.tensors().data(), tensor_of_chunk.data(), nullptr, nullptr, nullptr};
  const Step step{table.grads().data(), table.rng_keys().data(), table.scalar_indices().data(), nullptr};

  int64_t covered = 0;
  for (uint32_t chunk = 0; chunk < table.chunks(); ++chunk) {
    const Slice slice = slice_of(view, step, chunk);
    const uint32_t tensor = chunk / chunks, own = chunk % chunks;
    REQUIRE(tensor_of_chunk[chunk] == tensor, "chunk %u", chunk);
    REQUIRE(slice.begin == static_cast<int64_t>(own) * 16384, "chunk %u", chunk);
    REQUIRE(slice.count == (own == chunks - 1 ? 5 : 16384), "chunk %u: %d", chunk, slice.count);
    const Format format = slice.tensor.formats.param;
    const Operand operand = Operand::of(slice.tensor.param, format, slice);
    const uintptr_t expected =
        bases[tensor] + static_cast<uintptr_t>(own) * 16384 * static_cast<uintptr_t>(size_of(format));
    REQUIRE(reinterpret_cast<uintptr_t>(operand.begin) == expected && operand.aligned, "chunk %u", chunk);
    const auto moment = StoredMoment::of(slice.tensor.exp_avg, slice.tensor.formats.exp_avg, slice);
    const uintptr_t codes = (bases[tensor] << 1) + uintptr_t{own} * (tensor == 1 ? 4096 : 16384);
    REQUIRE(reinterpret_cast<uintptr_t>(moment.codes) == codes, "chunk %u", chunk);
    // Exponents follow the codes of all runs, of which the last holds 5.
    const uintptr_t exponents = (bases[tensor] << 1) + numel - 5 + 32 + uintptr_t{own} * 512;
    if (tensor == 2) REQUIRE(reinterpret_cast<uintptr_t>(moment.exponents) == exponents, "chunk %u", chunk);
    const uintptr_t residual = (bases[tensor] << 2) + uintptr_t{own} * 16384 * (tensor == 1 ? 1 : 4);
    if (tensor > 0)
      REQUIRE(reinterpret_cast<uintptr_t>(StoredParam::of(slice).residual) == residual, "chunk %u", chunk);
    covered += slice.count;
  }
  REQUIRE(covered == 3 * numel, "%lld", static_cast<long long>(covered));

  TensorEntry beyond{};
  beyond.numel = (int64_t{1} << 31) * chunk_size;
  try {
    HostTable(false).add(beyond, {}, 0, 0, 0, 0);
    fail("2^31 chunks were accepted");
  } catch (const std::length_error&) {
  }
  std::printf("%u chunks of 3 tensors of %lld elements\n", table.chunks(), static_cast<long long>(numel));
}

// ---------------------------------------------------------------------------------------------------------- counts

// Adds one to everything it is given: what is written twice shows 2, what is left out 0.
template <int count>
struct Count : Traits {
  static constexpr int moments = count;
  static constexpr bool bounded = true, bound_by_group = false, divides = false, reads_variance = false;
  static void update(const Scalars&, float, float& p, float, float& m, float& v, float& x) {
    p += 1.0f;
    if constexpr (count > 0) m += 1.0f;
    if constexpr (count > 1) v += 1.0f;
    if constexpr (count > 2) x += 1.0f;
  }
};

// Small whole numbers: their sums are exact in any order.
float grad_value(int64_t i) { return static_cast<float>(i * 7 % 251 - 100); }

template <int moments, ThresholdPass threshold_pass>
int64_t count_writes(const std::vector<Spec>& specs, Order order, bool coupled) {
  Model model(specs, {moments, false}, threshold_pass != ThresholdPass::none, 1);
  for (Tensor& t : model.tensors())
    if (t.spec.present)
      for (int64_t i = 0; i < t.spec.numel; ++i) t.grad.set(i, grad_value(i));
  Scalars s{};
  s.gradient_scale = s.decay = 1.0f;
  s.coupled = coupled;  // p is 0 when it is read, so the gradient stays what it is
  s.weight_decay = 1.0f;
  s.confidence_beta = 0.5, s.one_minus_confidence_beta = 0.5;
  model.run<Count<moments>, threshold_pass>({s}, order);

  int64_t elements = 0;
  for (std::size_t k = 0; k < model.tensors().size(); ++k) {
    const Tensor& t = model.tensors()[k];
    const float expected = t.spec.present && threshold_pass != ThresholdPass::pass_before ? 1.0f : 0.0f;
    int64_t first = 0, second = 0;
    for (int64_t i = 0; i < t.spec.numel; ++i) {
      REQUIRE(t.param.get(i) == expected, "tensor %zu p[%lld] = %g", k, static_cast<long long>(i), t.param.get(i));
      if (moments > 0)
        REQUIRE(t.exp_avg.get(i) == expected, "tensor %zu m[%lld] = %g", k, static_cast<long long>(i),
                t.exp_avg.get(i));
      if (moments > 1)
        REQUIRE(t.exp_avg_sq.get(i) == expected, "tensor %zu v[%lld] = %g", k, static_cast<long long>(i),
                t.exp_avg_sq.get(i));
      if (moments > 2)
        REQUIRE(t.aux.get(i) == expected, "tensor %zu x[%lld] = %g", k, static_cast<long long>(i), t.aux.get(i));
      if (t.spec.present)
        REQUIRE(t.grad.get(i) == grad_value(i), "tensor %zu g[%lld] was written", k, static_cast<long long>(i));
      const auto g = static_cast<int64_t>(grad_value(i));
      first += g, second += g * g;
    }
    if (t.threshold_state != nullptr) {
      double deviation = 0.25;
      if (t.spec.present && t.spec.numel > 0) {
        const auto n = static_cast<double>(t.spec.numel);
        const double mean = static_cast<double>(first) / n;
        const double variance = static_cast<double>(second) / n - mean * mean;
        deviation = 0.5 * 0.25 + 0.5 * std::sqrt(std::max(variance, 0.0));
      }
      REQUIRE(*t.threshold_state == deviation, "tensor %zu: %.17g, not %.17g", k, *t.threshold_state, deviation);
    }
    elements += t.spec.numel;
  }
  return elements;
}

void counts() {
  const std::vector<Spec> many = adversarial(3, true), few = adversarial(1, true);
  REQUIRE(many.size() > 2000, "%zu", many.size());
  int64_t elements = 0;
  elements += count_writes<3, ThresholdPass::none>(few, Order::reversed, true);
  elements += count_writes<1, ThresholdPass::same_pass>(many, Order::shuffled, false);
  elements += count_writes<1, ThresholdPass::pass_before>(few, Order::reversed, true);
  elements += count_writes<1, ThresholdPass::pass_before>(few, Order::shuffled, false);
#if !defined(SIGNADAM_QUICK)
  elements += count_writes<2, ThresholdPass::none>(many, Order::forward, false);
  elements += count_writes<0, ThresholdPass::none>(few, Order::reversed, true);
  elements += count_writes<1, ThresholdPass::none>(few, Order::shuffled, false);
  elements += count_writes<0, ThresholdPass::same_pass>(few, Order::forward, true);
  elements += count_writes<2, ThresholdPass::same_pass>(few, Order::reversed, true);
#endif
  std::printf("%lld elements of up to %zu tensors written exactly once\n", static_cast<long long>(elements),
              many.size());
}

// ----------------------------------------------------------------------------------------------------------- rules

// The order of additions of docs/numerics.md, written for clarity: pad, add rows, halve, repeat on the chunk sums.
double ordered_sum(std::vector<double> x) {
  do {
    x.resize((x.size() + chunk_size - 1) / chunk_size * chunk_size, 0.0);
    std::vector<double> sums;
    for (std::size_t chunk = 0; chunk < x.size(); chunk += chunk_size) {
      std::vector<double> lanes(x.begin() + static_cast<std::ptrdiff_t>(chunk),
                                x.begin() + static_cast<std::ptrdiff_t>(chunk + lane_count));
      for (int64_t row = 1; row < row_count; ++row)
        for (int64_t lane = 0; lane < lane_count; ++lane)
          lanes[lane] += x[chunk + static_cast<std::size_t>(row * lane_count + lane)];
      while (lanes.size() > 1) {
        std::vector<double> half(lanes.size() / 2);
        for (std::size_t i = 0; i < half.size(); ++i) half[i] = lanes[i] + lanes[i + half.size()];
        lanes = half;
      }
      sums.push_back(lanes[0]);
    }
    x = sums;
  } while (x.size() > 1);
  return x[0];
}

Scalars scalars_of(bool coupled, bool maximize, double alpha) {
  const double lr = 0.015625, weight_decay = 0.3;
  double row[scalar_count] = {};
  row[index_lr] = lr;
  row[index_weight_decay] = weight_decay;
  row[index_decay] = coupled ? 1.0 : 1 - lr * weight_decay;
  row[index_coupled] = coupled;
  row[index_gradient_scale] = maximize ? -1.0 : 1.0;
  row[index_alpha] = alpha;
  row[index_beta1] = 0.9, row[index_one_minus_beta1] = 1 - 0.9;
  row[index_beta2] = 0.999, row[index_one_minus_beta2] = 1 - 0.999;
  row[index_eps] = 1e-8;
  row[index_denominator] = 0.1;
  row[index_bias_correction] = 0.5;
  row[index_rho] = 0.25, row[index_one_minus_rho] = 0.75, row[index_beta3] = 0.9999,
  row[index_one_minus_beta3] = 1 - 0.9999, row[index_mix] = 0.02;
  row[index_lower] = 0.5, row[index_upper] = 1.0;
  row[index_averaging] = 0.25, row[index_shrinking] = 0.001, row[index_correction] = 0.3;
  row[index_confidence_beta] = 0.9, row[index_one_minus_confidence_beta] = 1 - 0.9;
  return Scalars::from_set(row);
}

struct Expected {
  std::vector<uint32_t> p, m, v, x;
  double threshold_state;
};

// The rule on every element in turn, without any traversal. `first` of an exact launch: only the deviation moves.
template <class Rule>
Expected by_hand(const Tensor& t, const Scalars& s, ThresholdPass threshold_pass) {
  Expected expected{{}, {}, {}, {}, t.threshold_state == nullptr ? 0.0 : *t.threshold_state};
  std::vector<double> first, second;
  for (int64_t i = 0; i < t.spec.numel; ++i) {
    first.push_back(effective_gradient(s, t.param.get(i), t.grad.get(i)));
    second.push_back(first.back() * first.back());
  }
  const auto move = [&] {
    if (t.threshold_state != nullptr && t.spec.numel > 0)
      expected.threshold_state =
          next_threshold_state(expected.threshold_state, {ordered_sum(first), ordered_sum(second)}, t.spec.numel, s);
  };
  if (threshold_pass == ThresholdPass::pass_before) move();
  const float alpha =
      t.threshold_state == nullptr ? s.alpha : static_cast<float>(s.adaptive_alpha * expected.threshold_state);
  if (threshold_pass == ThresholdPass::same_pass) move();
  for (int64_t i = 0; i < t.spec.numel; ++i) {
    float p = t.param.get(i), m = 0, v = 0, x = 0;
    if (Rule::moments > 0) m = t.exp_avg.get(i);
    if (Rule::moments > 1) v = t.exp_avg_sq.get(i);
    if (has_third<Rule>) x = t.aux.get(i);
    apply<Rule>(s, alpha, p, t.grad.get(i), m, v, x);
    expected.p.push_back(stored_bits(t.spec.param, p));
    expected.m.push_back(bits_of(m));
    expected.v.push_back(bits_of(v));
    expected.x.push_back(bits_of(x));
  }
  return expected;
}

template <class Rule, ThresholdPass threshold_pass>
int64_t compare_rule(const std::vector<Spec>& specs, Order order) {
  Model model(specs, Uses::of<Rule>(), threshold_pass != ThresholdPass::none, 2);
  const std::vector<Scalars> scalars = {scalars_of(false, false, 0.5), scalars_of(true, true, 0.25)};
  std::mt19937 random(11);
  std::normal_distribution<float> normal;
  for (Tensor& t : model.tensors())
    for (int64_t i = 0; i < t.spec.numel; ++i) {
      t.param.set(i, normal(random));
      if (t.spec.present) t.grad.set(i, random() % 5 == 0 ? 0.0f : normal(random));
      if (Rule::moments > 0) t.exp_avg.set(i, normal(random));
      if (Rule::moments > 1) t.exp_avg_sq.set(i, std::abs(normal(random)));
      if (has_third<Rule>) t.aux.set(i, std::abs(normal(random)));
    }
  std::vector<Expected> all;
  for (const Tensor& t : model.tensors())
    all.push_back(t.spec.present ? by_hand<Rule>(t, scalars[t.group], threshold_pass) : Expected{});
  if constexpr (threshold_pass == ThresholdPass::pass_before) {
    // As the launcher does: the statistics kernel is one for all rules, and the update follows.
    model.run<SignAdamPP, ThresholdPass::pass_before>(scalars, order);
    model.run<Rule, ThresholdPass::none>(scalars, order);
  } else {
    model.run<Rule, threshold_pass>(scalars, order);
  }

  int64_t elements = 0;
  for (std::size_t k = 0; k < model.tensors().size(); ++k) {
    const Tensor& t = model.tensors()[k];
    if (!t.spec.present) continue;
    const Expected& expected = all[k];
    for (int64_t i = 0; i < t.spec.numel; ++i) {
      const auto j = static_cast<std::size_t>(i);
      REQUIRE(t.param.bits(i) == expected.p[j], "tensor %zu p[%zu]", k, j);
      if (Rule::moments > 0) REQUIRE(t.exp_avg.bits(i) == expected.m[j], "tensor %zu m[%zu]", k, j);
      if (Rule::moments > 1) REQUIRE(t.exp_avg_sq.bits(i) == expected.v[j], "tensor %zu v[%zu]", k, j);
      if (has_third<Rule>) REQUIRE(t.aux.bits(i) == expected.x[j], "tensor %zu x[%zu]", k, j);
    }
    if (t.threshold_state != nullptr)
      REQUIRE(*t.threshold_state == expected.threshold_state, "tensor %zu: %.17g, not %.17g", k, *t.threshold_state,
              expected.threshold_state);
    elements += t.spec.numel;
  }
  return elements;
}

void rules() {
  const std::vector<Spec> specs = adversarial(1, true);
  int64_t elements = 0;
#if !defined(SIGNADAM_QUICK)
  const std::vector<Spec> small = adversarial(1, false);
#define SIGNADAM_COMPARE(Rule) elements += compare_rule<Rule, ThresholdPass::none>(small, Order::shuffled);
  SIGNADAM_RULES(SIGNADAM_COMPARE)
#undef SIGNADAM_COMPARE
  elements += compare_rule<SignAdamPP, ThresholdPass::pass_before>(specs, Order::shuffled);
#endif
  elements += compare_rule<SignAdamPP, ThresholdPass::same_pass>(specs, Order::reversed);
  std::printf("%lld elements as by hand\n", static_cast<long long>(elements));
}

// ---------------------------------------------------------------------------------------------------------- stored

// Scalars under which codes of any number of levels stay within them.
Scalars gentle(bool coupled, bool maximize) {
  Scalars s = scalars_of(coupled, maximize, 0.5);
  s.beta1 = s.one_minus_beta1 = 0.5f;
  return s;
}

// Numbers that each form may hold.
void fill(Model& model) {
  std::mt19937 random(12);
  std::normal_distribution<float> normal;
  for (Tensor& t : model.tensors()) {
    const int64_t n = t.spec.numel;
    const auto fill_codes = [&](Buffer& moment) {
      const int bits = bits_of(moment.format());
      const int levels = (1 << (bits - 1)) - 1;
      for (int64_t i = 0; i < n; ++i) {
        const int code = static_cast<int>(random() % static_cast<uint32_t>(2 * levels + 1)) - levels;
        const int64_t at = i * bits / 8, shift = i * bits % 8;
        moment.begin()[at] = static_cast<unsigned char>(moment.begin()[at] | (code & ((1 << bits) - 1)) << shift);
      }
      if (moment.format() == Format::block8)
        for (std::size_t i = bytes_of(Format::int8, n); i < moment.bytes(); ++i)
          moment.begin()[i] = static_cast<unsigned char>(random() % 247 - 126);
    };
    for (int64_t i = 0; i < n; ++i) {
      t.param.set(i, normal(random));
      if (t.spec.present) t.grad.set(i, random() % 5 == 0 ? 0.0f : normal(random));
      if (t.exp_avg.bytes() > 0 && !is_packed(t.exp_avg.format())) t.exp_avg.set(i, normal(random));
      if (t.exp_avg_sq.bytes() > 0) t.exp_avg_sq.set(i, std::abs(normal(random)));
      if (t.aux.bytes() > 0) t.aux.set(i, std::abs(normal(random)));
    }
    if (t.exp_avg.bytes() > 0 && is_packed(t.exp_avg.format())) fill_codes(t.exp_avg);
    if (t.spec.param_storage == ParamStorage::master)
      for (int64_t i = 0; i < n; ++i) set_value(t.residual.begin(), Format::fp32, i, t.param.get(i) * 1.0001f);
    else
      for (std::size_t i = 0; i < t.residual.bytes(); ++i) t.residual.begin()[i] = static_cast<unsigned char>(random());
  }
}

template <class Rule, ThresholdPass threshold_pass>
std::vector<std::vector<unsigned char>> after_step(const std::vector<Spec>& specs, Order order) {
  Model model(specs, Uses::of<Rule>(), threshold_pass != ThresholdPass::none, 2);
  fill(model);
  const std::vector<Scalars> scalars = {gentle(false, false), gentle(true, true)};
  if constexpr (threshold_pass == ThresholdPass::pass_before) {
    model.run<SignAdamPP, ThresholdPass::pass_before, Storage::any>(scalars, order);
    model.run<Rule, ThresholdPass::none, Storage::any>(scalars, order);
  } else {
    model.run<Rule, threshold_pass, Storage::any>(scalars, order);
  }
  std::vector<std::vector<unsigned char>> bytes;
  for (const Tensor& t : model.tensors()) {
    for (const Buffer* buffer : t.buffers()) bytes.emplace_back(buffer->begin(), buffer->begin() + buffer->bytes());
    if (t.threshold_state != nullptr) {
      const auto* const x = reinterpret_cast<const unsigned char*>(t.threshold_state.get());
      bytes.emplace_back(x, x + sizeof(double));
    }
  }
  return bytes;
}

// Any order of blocks and threads leaves the same bytes. What they must be is compared outside, with the reference.
template <class Rule, ThresholdPass threshold_pass>
std::size_t compare_orders(bool large) {
  const auto specs = stored_specs<Rule>(large);
  const auto expected = after_step<Rule, threshold_pass>(specs, Order::forward);
  for (const Order order : {Order::reversed, Order::shuffled}) {
    const auto actual = after_step<Rule, threshold_pass>(specs, order);
    for (std::size_t i = 0; i < expected.size(); ++i)
      REQUIRE(actual[i] == expected[i], "%s: operand %zu in order %d", Rule::name, i, static_cast<int>(order));
  }
  return specs.size();
}

void stored() {
  std::size_t tensors = 0;
  tensors += compare_orders<SignAdamPP, ThresholdPass::same_pass>(false);
#if defined(SIGNADAM_QUICK)
  tensors += compare_orders<Signum, ThresholdPass::none>(true);
  tensors += compare_orders<AdamAMSGrad, ThresholdPass::none>(true);
#else
#define SIGNADAM_COMPARE(Rule) tensors += compare_orders<Rule, ThresholdPass::none>(true);
  SIGNADAM_RULES(SIGNADAM_COMPARE)
#undef SIGNADAM_COMPARE
  tensors += compare_orders<SignAdamPP, ThresholdPass::pass_before>(false);
#endif
  std::printf("%zu tensors in any order\n", tensors);
}

// -------------------------------------------------------------------------------------------------------- observed

// What is observed of each chunk, against a sum over its elements in turn; and the update is that of a table that is
// not observed. Sums of doubles in another order differ by their roundings, counts do not.
template <class Rule, ThresholdPass threshold_pass>
std::size_t compare_observed(const std::vector<Spec>& specs, Order order) {
  constexpr bool adaptive = threshold_pass != ThresholdPass::none;
  Model model(specs, Uses::of<Rule>(), adaptive, 1), plain(specs, Uses::of<Rule>(), adaptive, 1);
  fill(model), fill(plain);
  const Scalars s = gentle(true, true);
  std::vector<std::vector<float>> before(specs.size()), gradients(specs.size());
  for (std::size_t k = 0; k < specs.size(); ++k) {
    const Tensor& t = model.tensors()[k];
    for (int64_t i = 0; i < t.spec.numel && t.spec.present; ++i) {
      gradients[k].push_back(effective_gradient(s, t.param.get(i), t.grad.get(i)));
      before[k].push_back(Rule::moments > 0 ? t.exp_avg.get(i) : 0.0f);
    }
  }
  model.run<Rule, threshold_pass, Storage::with_statistics>({s}, order);
  plain.run<Rule, threshold_pass, plain_for<Rule>>({s}, order);
  std::size_t chunks = 0;
  for (std::size_t k = 0; k < specs.size(); ++k) {
    const Tensor& t = model.tensors()[k];
    const auto now = t.buffers(), then = plain.tensors()[k].buffers();
    for (std::size_t b = 0; b < now.size(); ++b)
      REQUIRE(now[b]->bytes() == 0 || std::memcmp(now[b]->begin(), then[b]->begin(), now[b]->bytes()) == 0,
              "%s: operand %zu of tensor %zu", Rule::name, b, k);
    if (!t.spec.present) continue;
    const float alpha = t.threshold_state == nullptr ? s.alpha : static_cast<float>(s.adaptive_alpha * 0.25);
    for (int64_t begin = 0; begin < t.spec.numel; begin += chunk_size, ++chunks) {
      ChunkStatistics expected{};
      for (int64_t i = begin; i < t.spec.numel && i < begin + chunk_size; ++i) {
        const auto j = static_cast<std::size_t>(i);
        const double g = gradients[k][j], m = before[k][j], after = Rule::moments > 0 ? t.exp_avg.get(i) : 0.0f;
        const bool passes = std::abs(g) > alpha;
        expected.passed += passes, expected.squares += g * g, expected.passed_squares += passes ? g * g : 0.0;
        expected.flips += m * after < 0.0, expected.magnitude += std::abs(after);
      }
      const ChunkStatistics& found =
          model.chunk_statistics()[model.entries()[k].first_chunk + static_cast<uint32_t>(begin / chunk_size)];
      const auto near = [](double a, double b) { return std::abs(a - b) <= 1e-10 * std::abs(b); };
      REQUIRE(found.passed == expected.passed && found.flips == expected.flips, "%s: tensor %zu", Rule::name, k);
      REQUIRE(near(found.squares, expected.squares) && near(found.passed_squares, expected.passed_squares) &&
                  near(found.magnitude, expected.magnitude),
              "%s: tensor %zu", Rule::name, k);
      REQUIRE(found.threshold == alpha, "%s: tensor %zu: %g", Rule::name, k, found.threshold);
    }
  }
  return chunks;
}

void chunk_statistics() {
  const std::vector<Spec> specs = adversarial(1, true);
  std::size_t chunks = 0;
  chunks += compare_observed<SignAdamPP, ThresholdPass::same_pass>(specs, Order::shuffled);
#if !defined(SIGNADAM_QUICK)
  chunks += compare_observed<SignSGD, ThresholdPass::none>(specs, Order::shuffled);
  chunks += compare_observed<SignAdamPP, ThresholdPass::none>(specs, Order::reversed);
  chunks += compare_observed<AdamAMSGrad, ThresholdPass::none>(specs, Order::forward);
#endif
  std::printf("%zu chunks observed\n", chunks);
}

// -------------------------------------------------------------------------------------------------------- accesses

#if defined(SIGNADAM_TRACED)
struct Times {
  int reads, writes;
};

// Each byte of `buffer` from `begin` on, `count` of them, so many times and by one thread.
void expect(const Buffer& buffer, std::size_t begin, std::size_t count, Times times, const char* what, std::size_t k) {
  for (std::size_t i = begin; i < begin + count; ++i) {
    Accesses& byte = accesses_of[static_cast<std::size_t>(buffer.begin() - arena) + i];
    REQUIRE(byte.reads == times.reads && byte.writes == times.writes, "byte %zu of %s of tensor %zu: %d and %d", i,
            what, k, byte.reads, byte.writes);
    REQUIRE(!byte.several && !byte.read_after_write, "byte %zu of %s of tensor %zu", i, what, k);
    byte = {};
  }
}

// An exponent is read by all threads that have codes under it, and then written by one of them.
void expect_exponents(const Buffer& buffer, int64_t numel, Times once, std::size_t k) {
  const int64_t runs = (numel + 31) / 32;
  for (int64_t run = 0; run < runs; ++run) {
    const int64_t left = numel - 32 * run;
    const int pieces = static_cast<int>(left < 32 ? (left + 7) / 8 : 4);
    Accesses& byte = accesses_of[buffer.begin() - arena + 32 * runs + run];
    REQUIRE(byte.reads == pieces * once.reads && byte.writes == once.writes && !byte.read_after_write,
            "exponent %lld of tensor %zu: %d and %d", static_cast<long long>(run), k, byte.reads, byte.writes);
    byte = {};
  }
}

template <class Rule, ThresholdPass threshold_pass, Storage storage>
std::size_t count_accesses(const std::vector<Spec>& specs, Order order, bool coupled) {
  constexpr bool updates = threshold_pass != ThresholdPass::pass_before;
  arena_used = 0;
  Model model(specs, Uses::of<Rule>(), threshold_pass != ThresholdPass::none, 1);
  fill(model);
  model.run<Rule, threshold_pass, storage>({gentle(coupled, false)}, order);
  std::size_t bytes = 0;
  for (std::size_t k = 0; k < model.tensors().size(); ++k) {
    const Tensor& t = model.tensors()[k];
    const int64_t numel = t.spec.numel;
    const Times once = t.spec.present && updates ? Times{1, 1} : Times{0, 0};
    const Times param = t.spec.present && !updates && coupled ? Times{1, 0} : once;
    expect(t.param, 0, t.param.bytes(), param, "param", k);
    expect(t.residual, 0, t.residual.bytes(), param, "residual", k);
    expect(t.grad, 0, t.grad.bytes(), {1, 0}, "gradient", k);
    for (const Buffer* moment : {&t.exp_avg, &t.exp_avg_sq}) {
      // Codes by whole pieces of 8, of which the last run may have fewer than it has room for.
      const bool packed = moment->bytes() > 0 && is_packed(moment->format());
      const auto pieces = static_cast<std::size_t>((numel + 7) / 8);
      const std::size_t used = packed ? pieces * static_cast<std::size_t>(bits_of(moment->format())) : moment->bytes();
      expect(*moment, 0, used, once, "moment", k);
      if (packed && moment->format() == Format::block8) expect_exponents(*moment, numel, once, k);
    }
    expect(t.aux, 0, t.aux.bytes(), Rule::reads_variance && once.reads > 0 ? Times{1, 0} : once, "aux", k);
    for (const Buffer* buffer : t.buffers()) bytes += buffer->bytes();
  }
  // All that was expected is cleared: of what is left nothing may have been touched, guards and paddings included.
  for (std::size_t i = 0; i < arena_used; ++i)
    REQUIRE(accesses_of[i].reads == 0 && accesses_of[i].writes == 0, "byte %zu of the arena", i);
  return bytes;
}

template <class Rule, ThresholdPass threshold_pass>
std::size_t count_all_accesses(Order order) {
  const bool coupled = order != Order::forward;
  const auto specs = stored_specs<Rule>(true);
  return count_accesses<Rule, threshold_pass, Storage::any>(specs, order, coupled) +
         count_accesses<Rule, threshold_pass, plain_for<Rule>>(adversarial(1, Rule::moments != 1), order, coupled);
}

void accesses() {
  std::size_t bytes = 0;
#define SIGNADAM_COUNT(Rule) bytes += count_all_accesses<Rule, ThresholdPass::none>(Order::shuffled);
#if defined(SIGNADAM_QUICK)
  SIGNADAM_COUNT(Signum)
  SIGNADAM_COUNT(AdamAMSGrad)
#else
  SIGNADAM_RULES(SIGNADAM_COUNT)
  bytes += count_all_accesses<SignAdamPP, ThresholdPass::pass_before>(Order::forward);
#endif
#undef SIGNADAM_COUNT
  bytes += count_all_accesses<SignAdamPP, ThresholdPass::same_pass>(Order::reversed);
  bytes += count_all_accesses<SignAdamPP, ThresholdPass::pass_before>(Order::reversed);
  REQUIRE(bytes > 10'000'000, "%zu", bytes);
  std::printf("%zu bytes as often as they must be, each by one thread\n", bytes);
}
#endif

// ---------------------------------------------------------------------------------------------------------- levels

// finish_statistics and the sums of a norm on more chunk sums than one chunk holds, which no test has the memory to
// make from gradients.
void levels() {
  std::mt19937 random(5);
  std::normal_distribution<double> normal;
  const Scalars s = scalars_of(false, false, 0.5);
  for (const int64_t chunks : {1, 2, 2049, 16384, 16385, 3 * 16384 + 77}) {
    std::vector<Sums> sums(static_cast<std::size_t>(chunks) + 2);
    std::vector<double> first, second;
    for (Sums& x : sums) x = {normal(random), 1e5 * std::abs(normal(random))};
    for (int64_t i = 0; i < chunks; ++i) first.push_back(sums[i + 1].first), second.push_back(sums[i + 1].second);
    const Sums before = sums.front(), after = sums.back();
    double threshold_state = 0.75;
    TensorEntry tensor{};
    tensor.threshold_state = &threshold_state;
    tensor.numel = (chunks - 1) * chunk_size + 3;
    tensor.first_chunk = 1;
    const double expected =
        next_threshold_state(threshold_state, {ordered_sum(first), ordered_sum(second)}, tensor.numel, s);
    HostBlock block(Order::shuffled, 9);
    block.start();
    finish_statistics(
        block, TableView{nullptr, nullptr, sums.data(), nullptr, nullptr}, tensor,
        [&](double state, const Sums& sums) { return next_threshold_state(state, sums, tensor.numel, s); });
    REQUIRE(threshold_state == expected && expected != 0.75, "%lld chunks: %.17g, not %.17g",
            static_cast<long long>(chunks), threshold_state, expected);
    REQUIRE(
        std::memcmp(&sums.front(), &before, sizeof before) == 0 && std::memcmp(&sums.back(), &after, sizeof after) == 0,
        "sums of a neighbour were written at %lld chunks", static_cast<long long>(chunks));
    std::vector<double> squares = second, lanes(lane_count);
    sum_chunks(block, lanes.data(), squares.data(), chunks);
    REQUIRE(squares[0] == ordered_sum(second), "squares of %lld chunks", static_cast<long long>(chunks));
  }
  std::printf("up to %d chunks\n", 3 * 16384 + 77);
}

}  // namespace
}  // namespace signadam::host

#if defined(SIGNADAM_TRACED)
// What a compiler calls for ThreadSanitizer. Nothing here may be instrumented itself.
#define SIGNADAM_HOOK __attribute__((no_sanitize("thread"))) void
extern "C" {
#define SIGNADAM_TRACE(size)                                                                            \
  SIGNADAM_HOOK __tsan_read##size(void* at) { signadam::host::trace(at, size, false); }                 \
  SIGNADAM_HOOK __tsan_write##size(void* at) { signadam::host::trace(at, size, true); }                 \
  SIGNADAM_HOOK __tsan_unaligned_read##size(const void* at) { signadam::host::trace(at, size, false); } \
  SIGNADAM_HOOK __tsan_unaligned_write##size(void* at) { signadam::host::trace(at, size, true); }
SIGNADAM_TRACE(1)
SIGNADAM_TRACE(2)
SIGNADAM_TRACE(4)
SIGNADAM_TRACE(8)
SIGNADAM_TRACE(16)
SIGNADAM_HOOK __tsan_read_range(void* at, std::size_t size) { signadam::host::trace(at, size, false); }
SIGNADAM_HOOK __tsan_write_range(void* at, std::size_t size) { signadam::host::trace(at, size, true); }
SIGNADAM_HOOK __tsan_init() {}
SIGNADAM_HOOK __tsan_func_entry(void*) {}
SIGNADAM_HOOK __tsan_func_exit() {}
SIGNADAM_HOOK __tsan_vptr_update(void**, void*) {}
SIGNADAM_HOOK __tsan_vptr_read(void**) {}
}
#endif

int main(int argc, char** argv) {
  using namespace signadam::host;
#if defined(SIGNADAM_TRACED)
  const std::map<std::string, void (*)()> parts = {{"accesses", accesses}};
#else
  const std::map<std::string, void (*)()> parts = {{"arithmetic", arithmetic}, {"huge", huge},
                                                   {"counts", counts},         {"rules", rules},
                                                   {"stored", stored},         {"step statistics", chunk_statistics},
                                                   {"levels", levels}};
#endif
  const auto found = argc == 2 ? parts.find(argv[1]) : parts.end();
  if (found == parts.end()) {
    for (const auto& part : parts) std::printf("%s\n", part.first.c_str());
    return 2;
  }
  found->second();
  return 0;
}
