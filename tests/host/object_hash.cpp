// Runs the hash of csrc/python/object_hash.h over objects that differ little, and prints what two builds must agree on.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <set>
#include <utility>
#include <vector>

#include "../../csrc/python/object_hash.h"

namespace {

using signadam::ObjectHash;

int failures = 0;

void require(bool holds, const char* what, std::size_t size, std::size_t at) {
  if (holds) return;
  std::printf("FAILED: %s: size %zu, at %zu\n", what, size, at);
  ++failures;
}

uint64_t hash(const std::vector<char>& object) { return ObjectHash::of(object.data(), object.size()); }

// Small numbers and addresses, as torch's objects hold them, with some words alike.
std::vector<char> object_of(std::size_t size) {
  std::vector<char> object(size);
  for (std::size_t at = 0; at + 8 <= size; at += 8) {
    const uint64_t number = at / 8 % 3 == 0 ? 0x7f3a12345670u + at : at / 8 % 3 == 1 ? at / 24 : 0;
    std::memcpy(object.data() + at, &number, 8);
  }
  return object;
}

void check(std::size_t size) {
  const std::vector<char> object = object_of(size);
  const uint64_t before = hash(object);
  std::printf("%zu %016llx\n", size, static_cast<unsigned long long>(before));
  std::set<uint64_t> hashes{before};
  std::size_t seen = 1;
  const auto is_new = [&](const std::vector<char>& changed) { return hashes.insert(hash(changed)).second; };
  for (std::size_t bit = 0; bit < 8 * size; ++bit, ++seen) {
    std::vector<char> changed = object;
    changed[bit / 8] = static_cast<char>(changed[bit / 8] ^ (1 << bit % 8));
    require(is_new(changed), "a bit", size, bit);
  }
  for (std::size_t a = 0; a + 8 <= size; a += 8)
    for (std::size_t b = a + 8; b + 8 <= size; b += 8) {
      std::vector<char> changed = object;
      std::swap_ranges(changed.begin() + static_cast<std::ptrdiff_t>(a),
                       changed.begin() + static_cast<std::ptrdiff_t>(a + 8),
                       changed.begin() + static_cast<std::ptrdiff_t>(b));
      if (changed != object) require(is_new(changed), "two words that change places", size, a);
      for (int delta : {1, -1, 64, 4096}) {  // what one word gains the other loses
        changed = object;
        for (auto [at, by] : {std::pair<std::size_t, int>{a, delta}, {b, -delta}}) {
          uint64_t word;
          std::memcpy(&word, changed.data() + at, 8);
          word += static_cast<uint64_t>(static_cast<int64_t>(by));
          std::memcpy(changed.data() + at, &word, 8);
        }
        require(hash(changed) != before, "two words with the same sum", size, a);
      }
    }
}

}  // namespace

int main() {
  for (std::size_t size = ObjectHash::block; size <= 256; size += 8) check(size);
  check(ObjectHash::most_bytes);
  require(ObjectHash::of(3, 5) != ObjectHash::of(5, 3), "a pair that changes places", 16, 0);
  require(ObjectHash::of(3, 5) != ObjectHash::of(4, 5) && ObjectHash::of(3, 5) != ObjectHash::of(3, 6), "a pair", 16,
          0);
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
