#include "vote.h"

#include "float_environment.h"
#include "pool.h"

namespace signadam::cpu {
namespace {

// The index of a width in tables of kernels.
int width_index(int bits) { return bits == 2 ? 0 : bits == 4 ? 1 : bits == 8 ? 2 : 3; }

// Calls body(entry's index, its first element of the chunk, number of elements) for every chunk.
template <class Body>
void for_chunks(const VoteTable& table, int threads, Body body) {
  parallel_for(table.chunks, threads, [&](int64_t chunk) {
    const FloatEnvironment ieee;
    const int32_t index = table.entry_of_chunk[chunk];
    const VoteEntry& entry = table.entries[index];
    const int64_t begin = (chunk - entry.first_chunk) * vote_chunk;
    const int64_t left = entry.numel - begin;
    body(index, begin, left < vote_chunk ? left : vote_chunk);
  });
}

}  // namespace

void cast_votes(const VoteTable& table, const VoteOptions& options, Format format, uint32_t* codes, int threads) {
  const CastChunk cast = kernels().cast[static_cast<int>(options.memory)][options.residual];
  for_chunks(table, threads, [&](int32_t index, int64_t begin, int64_t count) {
    const VoteEntry& entry = table.entries[index];
    cast(entry, table.scalars[index], options, begin, count, format, codes + entry.first_word + begin / codes_per_word);
  });
}

void count_votes(const uint32_t* codes, int64_t workers, int64_t words, int bits, bool majority, uint32_t* result,
                 int threads) {
  const CountWords count = majority ? kernels().majority : kernels().count[width_index(bits)];
  constexpr int64_t words_at_once = vote_chunk / codes_per_word;
  parallel_for((words + words_at_once - 1) / words_at_once, threads, [&](int64_t chunk) {
    const int64_t begin = chunk * words_at_once, left = words - begin;
    count(codes + begin, workers, words, left < words_at_once ? left : words_at_once, result + begin * (bits / 2));
  });
}

void read_votes(const VoteTable& table, const RngKey* keys, VoteUse use, Format format, int bits, float divisor,
                const uint32_t* result, int threads) {
  const ReadChunk read = kernels().read[width_index(bits)];
  for_chunks(table, threads, [&](int32_t index, int64_t begin, int64_t count) {
    const VoteEntry& entry = table.entries[index];
    const RngKey key = keys == nullptr ? RngKey{0, 0} : keys[index];
    read(entry, table.scalars[index], key, begin, count, format, use, divisor,
         result + (entry.first_word + begin / codes_per_word) * (bits / 2));
  });
}

}  // namespace signadam::cpu
