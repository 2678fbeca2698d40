// The bytes that the CPU kernels leave, as a line for each rule, form and size: what must not depend on the processor
// that they were compiled for. Built with one of csrc/cpu/kernels_*.cpp, whose table SIGNADAM_TABLE names.
#include <cinttypes>
#include <cstdio>
#include <vector>

#include "../../csrc/cpu/kernels.h"

namespace signadam::cpu {
namespace {

// A multiplicative generator (Lehmer, 1951): the same numbers everywhere.
class Numbers {
 public:
  uint32_t bits() { return static_cast<uint32_t>((state_ *= 0xda942042e4dd58b5ull) >> 32); }
  float uniform() { return static_cast<float>(static_cast<int32_t>(bits() >> 8) - (1 << 23)) * 0x1p-23f; }

 private:
  uint64_t state_ = 0x9e3779b97f4a7c15ull;
};

// FNV-1a over what memory holds, with one NaN: processors choose its bits, and fp16 keeps its sign.
class Digest {
 public:
  void add(const std::vector<unsigned char>& memory, Format format) {
    if (format == Format::fp32)
      add_words<uint32_t>(memory, 0x7f800000u);
    else if (format == Format::fp16)
      add_words<uint16_t>(memory, 0x7c00u);
    else
      add_bytes(memory.data(), memory.size());
  }
  void add(double x) {
    uint64_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if (x != x) bits = 0x7ff8000000000000ull;
    add_bytes(reinterpret_cast<const unsigned char*>(&bits), sizeof bits);
  }
  uint64_t value() const { return value_; }

 private:
  template <class Word>
  void add_words(const std::vector<unsigned char>& memory, Word infinity) {
    for (std::size_t i = 0; i + sizeof(Word) <= memory.size(); i += sizeof(Word)) {
      Word word;
      std::memcpy(&word, memory.data() + i, sizeof word);
      if (static_cast<Word>(word << 1) > static_cast<Word>(infinity << 1)) word = infinity + 1;
      add_bytes(reinterpret_cast<const unsigned char*>(&word), sizeof word);
    }
  }
  void add_bytes(const unsigned char* bytes, std::size_t size) {
    for (std::size_t i = 0; i < size; ++i) value_ = (value_ ^ bytes[i]) * 0x100000001b3ull;
  }
  uint64_t value_ = 0xcbf29ce484222325ull;
};

struct Form {
  Format param, grad, exp_avg, exp_avg_sq;
  ParamStorage param_storage;
};

// What a program trains with, and what it never should: subnormals, infinities, NaN.
constexpr uint32_t special[] = {0x80000000u, 0x00000001u, 0x007fffffu, 0x7f7fffffu,
                                0x7f800000u, 0xff800000u, 0x7fc00000u};

std::vector<unsigned char> wide(Numbers& numbers, Format format, int count, bool positive, bool has_special) {
  std::vector<unsigned char> memory(static_cast<std::size_t>(bytes_before(format, count)));
  for (int i = 0; i < count; ++i) {
    float x = numbers.uniform();
    if (positive && x < 0) x = -x;
    if (has_special && i % 37 == 5) x = float_of(special[i / 37 % 7]);
    if (format == Format::fp32) {
      std::memcpy(memory.data() + 4 * i, &x, 4);
    } else {
      const uint16_t narrowed = narrow(format, x);
      std::memcpy(memory.data() + 2 * i, &narrowed, 2);
    }
  }
  return memory;
}

std::vector<unsigned char> moment(Numbers& numbers, Format format, int count, bool positive) {
  if (!is_packed(format)) return wide(numbers, format, count, positive, false);
  const auto codes = static_cast<std::size_t>(bytes_before(format, padded(count)));
  const bool scaled = format == Format::block8;
  std::vector<unsigned char> memory(codes + (scaled ? static_cast<std::size_t>(padded(count) / packed_run) : 0));
  for (std::size_t i = 0; i < codes; ++i) memory[i] = static_cast<unsigned char>(numbers.bits() >> 24);
  for (std::size_t i = codes; i < memory.size(); ++i) memory[i] = static_cast<unsigned char>(-8);
  return memory;
}

uint64_t steps(RuleIndex rule, bool third_is_moment, bool has_third, const Form& form, int count, bool observes) {
  Numbers numbers;
  auto param = wide(numbers, form.param, count, false, true);
  auto exp_avg = moment(numbers, form.exp_avg, count, false);
  auto exp_avg_sq = moment(numbers, form.exp_avg_sq, count, true);
  auto third = wide(numbers, Format::fp32, has_third ? count : 0, true, false);
  const int size = form.param_storage == ParamStorage::master    ? 4
                   : form.param_storage == ParamStorage::split16 ? 2
                   : form.param_storage == ParamStorage::split8  ? 1
                                                                 : 0;
  std::vector<unsigned char> residual(static_cast<std::size_t>(size * count));
  Slice slice{};
  slice.tensor.param = param.data();
  slice.tensor.exp_avg = exp_avg.data();
  slice.tensor.exp_avg_sq = exp_avg_sq.data();
  slice.tensor.aux = has_third ? third.data() : nullptr;
  slice.tensor.residual = size == 0 ? nullptr : residual.data();
  slice.tensor.numel = count;
  // Pairs of elements that share a random word begin with the first element, or with the second.
  slice.tensor.shard_offset = count % 2;
  slice.tensor.formats = {form.param, form.grad, form.exp_avg, form.exp_avg_sq, Format::fp32, form.param_storage};
  slice.count = count;
  Scalars s{};
  s.lr = 1e-2f, s.weight_decay = 0.1f, s.decay = 0.999f, s.beta1 = 0.9f, s.one_minus_beta1 = 0.1f;
  s.beta2 = 0.99f, s.one_minus_beta2 = 0.01f, s.eps = 1e-8f, s.denominator = 0.5f, s.bias_correction = 0.7f;
  s.rho = 0.3f, s.one_minus_rho = 0.7f, s.beta3 = 0.9999f, s.one_minus_beta3 = 0.0001f, s.mix = 0.02f, s.lower = 0.5f,
  s.upper = 1.0f;
  Digest digest;
  ChunkStatistics statistics{};
  for (uint64_t step = 1; step <= 4; ++step) {
    const auto grad = wide(numbers, form.grad, count, false, true);
    slice.grad = grad.data();
    slice.rng_keys = RngKey::of(7, 3, step);
    s.coupled = step == 2, s.gradient_scale = step == 3 ? -0.7f : 1.0f, s.cautious_decay = s.steers = step == 4;
    SIGNADAM_TABLE.update[rule](slice, s, 0.125f, observes ? &statistics : nullptr);
    if (observes) {
      digest.add(statistics.squares);
      digest.add(statistics.passed_squares);
      digest.add(statistics.magnitude);
      digest.add(statistics.passed + 2 * statistics.flips);
    }
    const Sums sums = SIGNADAM_TABLE.sum(slice, s, 0.125f);
    digest.add(sums.first);
    digest.add(sums.second);
  }
  digest.add(param, form.param);
  digest.add(exp_avg, form.exp_avg);
  digest.add(exp_avg_sq, form.exp_avg_sq);
  if (third_is_moment) digest.add(third, Format::fp32);
  digest.add(residual, form.param_storage == ParamStorage::master ? Format::fp32 : Format::int8);
  return digest.value();
}

template <class Rule>
void all_of(RuleIndex rule) {
  const auto print = [&](const Form& form, bool observes) {
    for (const int count : {1, 63, 2084, static_cast<int>(chunk_size)}) {
      const uint64_t found = steps(rule, Rule::moments > 2, has_third<Rule>, form, count, observes);
      std::printf("%s %d%d%d%d%d%s %d: %016" PRIx64 "\n", Rule::name, static_cast<int>(form.param),
                  static_cast<int>(form.grad), static_cast<int>(form.exp_avg), static_cast<int>(form.exp_avg_sq),
                  static_cast<int>(form.param_storage), observes ? " observed" : "", count, found);
    }
  };
  const auto moments = [](auto use) {
    use(Format::fp32, Format::fp32);
    use(Format::bf16, Format::bf16);
    if (Rule::bounded)
      for (const Format codes : {Format::int8, Format::int4, Format::int2}) use(codes, Format::bf16);
    if (has_blocks<Rule>) use(Format::block8, Format::fp32);
  };
  for (const Format param : {Format::fp32, Format::bf16, Format::fp16})
    moments([&](Format m, Format v) {
      print({param, param, m, v, ParamStorage::nearest}, m == Format::fp32);
      if (param == Format::fp32) return;
      print({param, Format::fp32, m, v, ParamStorage::stochastic}, false);
      print({param, param, m, v, ParamStorage::master}, false);
      if (param != Format::bf16) return;
      print({param, param, m, v, ParamStorage::split16}, false);
      print({param, param, m, v, ParamStorage::split8}, false);
    });
}

}  // namespace
}  // namespace signadam::cpu

int main() {
  using namespace signadam;
#define SIGNADAM_PRINT(Rule) cpu::all_of<Rule>(rule_##Rule);
  SIGNADAM_RULES(SIGNADAM_PRINT)
#undef SIGNADAM_PRINT
}
