#include "vote.h"

#include <type_traits>

#include "../block/operand.h"
#include "runtime.h"

namespace signadam::cuda {
namespace {

// Neighbouring entries that a thread takes at a time: their codes fill a byte.
constexpr int entries_at_once = 4;
constexpr int entries_of_block = entries_at_once * threads_per_block;

// The entries of a tensor that a block takes.
struct Chunk {
  int32_t index;  // of the tensor
  VoteEntry entry;
  int64_t begin;
  int count;

  static __device__ Chunk of(const VoteTable& table, uint32_t chunk) {
    const int32_t index = table.entry_of_chunk[chunk];
    const VoteEntry entry = table.entries[index];
    const int64_t begin = (chunk - entry.first_chunk) * vote_chunk;
    const int64_t left = entry.numel - begin;
    return {index, entry, begin, static_cast<int>(left < vote_chunk ? left : vote_chunk)};
  }
};

// A tensor from a chunk's first entry on, which may lie at any element: gradients are views of buckets.
template <Format format>
struct Elements {
  using Bits = std::conditional_t<format == Format::fp32, uint32_t, uint16_t>;
  Bits* begin;
  bool aligned;  // for accesses of four neighbours

  static __device__ Elements of(int64_t address, const Chunk& chunk) {
    Bits* const begin = reinterpret_cast<Bits*>(address) + chunk.begin;
    return {begin, reinterpret_cast<uintptr_t>(begin) % (entries_at_once * sizeof(Bits)) == 0};
  }

  // Four neighbours from entry `i` of the chunk on, `left` of them or more are there; what is not is 0.
  __device__ void load(int i, int left, float* x) const {
    Bits bits[entries_at_once] = {};
    if (aligned && left >= entries_at_once) {
      if constexpr (format == Format::fp32) {
        const Words words = load_words(begin + i);
        bits[0] = words.x, bits[1] = words.y, bits[2] = words.z, bits[3] = words.w;
      } else {
        const uint64_t word = load_one(reinterpret_cast<const uint64_t*>(begin + i));
        SIGNADAM_UNROLL
        for (int k = 0; k < entries_at_once; ++k) bits[k] = static_cast<uint16_t>(word >> (16 * k));
      }
    } else {
      SIGNADAM_UNROLL
      for (int k = 0; k < entries_at_once; ++k)
        if (k < left) bits[k] = load_one(begin + i + k);
    }
    SIGNADAM_UNROLL
    for (int k = 0; k < entries_at_once; ++k)
      if constexpr (format == Format::fp32)
        x[k] = float_of(bits[k]);
      else
        x[k] = widen(format, bits[k]);
  }

  __device__ void store(int i, int left, const Bits* bits) const {
    if (aligned && left >= entries_at_once) {
      if constexpr (format == Format::fp32) {
        store_words(begin + i, Words{bits[0], bits[1], bits[2], bits[3]});
      } else {
        uint64_t word = 0;
        SIGNADAM_UNROLL
        for (int k = 0; k < entries_at_once; ++k) word |= static_cast<uint64_t>(bits[k]) << (16 * k);
        store_one(reinterpret_cast<uint64_t*>(begin + i), word);
      }
    } else {
      SIGNADAM_UNROLL
      for (int k = 0; k < entries_at_once; ++k)
        if (k < left) store_one(begin + i + k, bits[k]);
    }
  }
};

__device__ void store_kept(const Elements<Format::fp32>& kept, int i, int left, const float* x) {
  uint32_t bits[entries_at_once];
  SIGNADAM_UNROLL
  for (int k = 0; k < entries_at_once; ++k) bits[k] = bits_of(x[k]);
  kept.store(i, left, bits);
}

struct CastArguments {
  VoteTable table;
  VoteOptions options;
  uint32_t* codes;
};

template <VoteMemory memory, bool residual, Format format>
__global__ void __launch_bounds__(threads_per_block) cast_kernel(const __grid_constant__ CastArguments arguments) {
  const Chunk chunk = Chunk::of(arguments.table, blockIdx.x);
  const VoteScalars s = arguments.table.scalars[chunk.index];
  const VoteOptions options = arguments.options;
  const auto values = Elements<format>::of(chunk.entry.values, chunk);
  const auto momentum = Elements<Format::fp32>::of(chunk.entry.momentum, chunk);
  const auto residuals = Elements<Format::fp32>::of(chunk.entry.residual, chunk);
  // Threads fill bytes of a word, the lowest first.
  auto* const bytes =
      reinterpret_cast<unsigned char*>(arguments.codes + chunk.entry.first_word) + chunk.begin / entries_at_once;
  const int with_rest = (chunk.count + codes_per_word - 1) / codes_per_word * codes_per_word;
  for (int i = static_cast<int>(threadIdx.x) * entries_at_once; i < with_rest; i += entries_of_block) {
    const int left = chunk.count - i;
    float g[entries_at_once], m[entries_at_once] = {}, r[entries_at_once] = {};
    values.load(i, left, g);
    if constexpr (memory != VoteMemory::none) momentum.load(i, left, m);
    if constexpr (residual) residuals.load(i, left, r);
    uint32_t byte = 0;
    SIGNADAM_UNROLL
    for (int k = 0; k < entries_at_once; ++k) {
      const int32_t code = cast_vote<memory, residual>(s, options.maximize, options.spoiled, g[k], m[k], r[k]);
      if (k < left) byte |= code_bits(code, 2, k);
    }
    if constexpr (memory != VoteMemory::none) store_kept(momentum, i, left, m);
    if constexpr (residual) store_kept(residuals, i, left, r);
    bytes[i / entries_at_once] = static_cast<unsigned char>(byte);
  }
}

struct CountArguments {
  const uint32_t* codes;
  int64_t workers, words;
  uint32_t* result;
};

template <int bits, bool majority>
__global__ void __launch_bounds__(threads_per_block) count_kernel(const __grid_constant__ CountArguments arguments) {
  constexpr int in_word = 32 / bits, parts = codes_per_word / in_word;
  const int64_t word = static_cast<int64_t>(blockIdx.x) * threads_per_block + threadIdx.x;
  if (word >= arguments.words) return;
  int32_t sums[codes_per_word] = {};
  uint32_t spoiled = 0;
  for (int64_t worker = 0; worker < arguments.workers; ++worker) {
    const uint32_t own = load_one(arguments.codes + worker * arguments.words + word);
    spoiled |= spoiled_in(own);
    SIGNADAM_UNROLL
    for (int i = 0; i < codes_per_word; ++i) sums[i] += code_at(own, 2, i);
  }
  SIGNADAM_UNROLL
  for (int part = 0; part < parts; ++part) {
    uint32_t packed = 0;
    SIGNADAM_UNROLL
    for (int place = 0; place < in_word; ++place) {
      const int i = part * in_word + place;
      const int32_t sum = majority ? majority_of(sums[i]) : sums[i];
      packed |= code_bits((spoiled >> (2 * i + 1) & 1u) != 0 ? spoiled_code(bits) : sum, bits, place);
    }
    arguments.result[word * parts + part] = packed;
  }
}

struct ReadArguments {
  VoteTable table;
  const RngKey* keys;
  float divisor;
  const uint32_t* result;
};

// The codes of four neighbours from entry `i` on: a byte up to two words.
template <int bits>
__device__ void load_codes(const uint32_t* words, int i, int32_t* codes) {
  const int four = i / entries_at_once;
  if constexpr (bits == 16) {
    SIGNADAM_UNROLL
    for (int half = 0; half < 2; ++half) {
      const uint32_t word = load_one(words + 2 * four + half);
      codes[2 * half] = code_at(word, bits, 0);
      codes[2 * half + 1] = code_at(word, bits, 1);
    }
  } else {
    using Field = std::conditional_t<bits == 2, uint8_t, std::conditional_t<bits == 4, uint16_t, uint32_t>>;
    const uint32_t field = load_one(reinterpret_cast<const Field*>(words) + four);
    SIGNADAM_UNROLL
    for (int k = 0; k < entries_at_once; ++k) codes[k] = code_at(field, bits, k);
  }
}

template <VoteUse use, Format format, int bits>
__global__ void __launch_bounds__(threads_per_block) read_kernel(const __grid_constant__ ReadArguments arguments) {
  const Chunk chunk = Chunk::of(arguments.table, blockIdx.x);
  const VoteScalars s = arguments.table.scalars[chunk.index];
  const auto values = Elements<format>::of(chunk.entry.values, chunk);
  const uint32_t* const words = arguments.result + (chunk.entry.first_word + chunk.begin / codes_per_word) * (bits / 2);
  // An element's high bits are the same in all of a chunk.
  RngSubkey keys{0, 0};
  if constexpr (use == VoteUse::step_stochastic)
    keys = RngSubkey::of(arguments.keys[chunk.index], static_cast<uint32_t>(chunk.begin >> 33));
  for (int i = static_cast<int>(threadIdx.x) * entries_at_once; i < chunk.count; i += entries_of_block) {
    const int left = chunk.count - i;
    int32_t codes[entries_at_once];
    load_codes<bits>(words, i, codes);
    float p[entries_at_once];
    if constexpr (use != VoteUse::write) values.load(i, left, p);
    typename Elements<format>::Bits stored[entries_at_once];
    [[maybe_unused]] uint32_t random = 0;
    SIGNADAM_UNROLL
    for (int k = 0; k < entries_at_once; ++k) {
      const float vote = vote_value(codes[k], bits, arguments.divisor);
      const float x = use == VoteUse::write ? vote : stepped(s, p[k], vote);
      if constexpr (format == Format::fp32) {
        stored[k] = bits_of(x);
      } else if constexpr (use == VoteUse::step_stochastic) {
        if (k % 2 == 0) random = random_word(keys, static_cast<uint32_t>((chunk.begin + i) >> 1) + k / 2);
        stored[k] = narrow(format, x, random >> (16 * (k % 2)) & 0xffffu);
      } else {
        stored[k] = narrow(format, x);
      }
    }
    values.store(i, left, stored);
  }
}

using CastKernel = void (*)(CastArguments);
using CountKernel = void (*)(CountArguments);
using ReadKernel = void (*)(ReadArguments);

template <VoteMemory memory, bool residual>
CastKernel cast_kernel_of(Format format) {
  return format == Format::fp32   ? cast_kernel<memory, residual, Format::fp32>
         : format == Format::bf16 ? cast_kernel<memory, residual, Format::bf16>
                                  : cast_kernel<memory, residual, Format::fp16>;
}

template <VoteMemory memory>
CastKernel cast_kernel_of(bool residual, Format format) {
  return residual ? cast_kernel_of<memory, true>(format) : cast_kernel_of<memory, false>(format);
}

CastKernel cast_kernel_of(VoteMemory memory, bool residual, Format format) {
  switch (memory) {
    case VoteMemory::none:
      return cast_kernel_of<VoteMemory::none>(residual, format);
    case VoteMemory::gradients:
      return cast_kernel_of<VoteMemory::gradients>(residual, format);
    default:
      return cast_kernel_of<VoteMemory::gated_signs>(residual, format);
  }
}

template <int bits>
ReadKernel read_kernel_of(VoteUse use, Format format) {
  constexpr auto fp32 = Format::fp32, bf16 = Format::bf16, fp16 = Format::fp16;
  switch (use) {
    case VoteUse::write:
      return format == fp32   ? read_kernel<VoteUse::write, fp32, bits>
             : format == bf16 ? read_kernel<VoteUse::write, bf16, bits>
                              : read_kernel<VoteUse::write, fp16, bits>;
    case VoteUse::step_stochastic:
      if (format == bf16) return read_kernel<VoteUse::step_stochastic, bf16, bits>;
      if (format == fp16) return read_kernel<VoteUse::step_stochastic, fp16, bits>;
      [[fallthrough]];  // fp32 is not rounded
    default:
      return format == fp32   ? read_kernel<VoteUse::step, fp32, bits>
             : format == bf16 ? read_kernel<VoteUse::step, bf16, bits>
                              : read_kernel<VoteUse::step, fp16, bits>;
  }
}

}  // namespace

void cast_votes(const VoteTable& table, const VoteOptions& options, Format format, uint32_t* codes, int device,
                void* stream) {
  CastArguments arguments{table, options, codes};
  start(cast_kernel_of(options.memory, options.residual, format), table.chunks, arguments, device, stream,
        "to launch the casting of votes");
}

void count_votes(const uint32_t* codes, int64_t workers, int64_t words, int bits, bool majority, uint32_t* result,
                 int device, void* stream) {
  CountArguments arguments{codes, workers, words, result};
  const CountKernel kernel = majority    ? count_kernel<2, true>
                             : bits == 2 ? count_kernel<2, false>
                             : bits == 4 ? count_kernel<4, false>
                             : bits == 8 ? count_kernel<8, false>
                                         : count_kernel<16, false>;
  start(kernel, (words + threads_per_block - 1) / threads_per_block, arguments, device, stream,
        "to launch the counting of votes");
}

void read_votes(const VoteTable& table, const RngKey* keys, VoteUse use, Format format, int bits, float divisor,
                const uint32_t* result, int device, void* stream) {
  ReadArguments arguments{table, keys, divisor, result};
  const ReadKernel kernel = bits == 2   ? read_kernel_of<2>(use, format)
                            : bits == 4 ? read_kernel_of<4>(use, format)
                            : bits == 8 ? read_kernel_of<8>(use, format)
                                        : read_kernel_of<16>(use, format);
  start(kernel, table.chunks, arguments, device, stream, "to launch the reading of votes");
}

}  // namespace signadam::cuda
