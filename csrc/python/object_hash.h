// A hash of an object's bytes, to recognise one that has not changed: the cost of a step on many small tensors.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace signadam {

// Sums of products, as in NH (Black and others, UMAC, 1999): the low half of each word times its high half, each with a
// key of its own added. A change of one word is all but never missed, nor do those of several cancel.
class ObjectHash {
 public:
  // Bytes that are added in one piece; less is not taken.
  static constexpr std::size_t block = 64;
  static constexpr std::size_t most_bytes = 512;

  // `size`: from `block` to `most_bytes`. The last piece overlaps the one before where it must.
  static uint64_t of(const char* bytes, std::size_t size) {
    ObjectHash hash;
    const char* keyed = reinterpret_cast<const char*>(keys.words);
    const char* const last = bytes + size - block;
    for (; bytes < last; bytes += block, keyed += block) hash.add(bytes, keyed);
    hash.add(last, keyed);
    return hash.total();
  }

  static uint64_t of(uint64_t a, uint64_t b) {
    __extension__ using Wide = unsigned __int128;
    const Wide product = static_cast<Wide>(a ^ 0x9E3779B97F4A7C15u) * (b ^ 0xD1B54A32D192ED03u);
    return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
  }

 private:
  struct Keys {
    alignas(16) uint64_t words[most_bytes / 8];
    constexpr Keys() : words() {
      uint64_t state = 0;
      for (uint64_t& word : words) {
        uint64_t z = state += 0x9E3779B97F4A7C15u;  // splitmix64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
        word = z ^ (z >> 31);
      }
    }
  };
  static const Keys keys;

  void add(const char* bytes, const char* keyed) {
    for (std::size_t at = 0; at < block; at += 16) add16(bytes + at, keyed + at);
  }

#if defined(__SSE2__)
  void add16(const char* bytes, const char* keyed) {
    const __m128i word = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
    const __m128i key = _mm_load_si128(reinterpret_cast<const __m128i*>(keyed));
    const __m128i sum = _mm_add_epi32(word, key);
    sums_ = _mm_add_epi64(sums_, _mm_mul_epu32(sum, _mm_srli_epi64(sum, 32)));
  }
  uint64_t total() const {
    alignas(16) uint64_t sums[2];
    _mm_store_si128(reinterpret_cast<__m128i*>(sums), sums_);
    return 3 * sums[0] + sums[1];
  }
  __m128i sums_ = _mm_setzero_si128();
#else
  void add16(const char* bytes, const char* keyed) {
    uint64_t word[2], key[2];
    std::memcpy(word, bytes, sizeof(word));
    std::memcpy(key, keyed, sizeof(key));
    for (std::size_t k = 0; k < 2; ++k) {
      const auto low = static_cast<uint32_t>(word[k]) + static_cast<uint32_t>(key[k]);
      const auto high = static_cast<uint32_t>(word[k] >> 32) + static_cast<uint32_t>(key[k] >> 32);
      sums_[k] += static_cast<uint64_t>(low) * high;
    }
  }
  uint64_t total() const { return 3 * sums_[0] + sums_[1]; }
  uint64_t sums_[2] = {0, 0};
#endif
};

inline constexpr ObjectHash::Keys ObjectHash::keys{};

}  // namespace signadam
