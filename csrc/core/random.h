// Counter-based random bits (docs/numerics.md): a function of seed, tensor, step and element, so every backend,
// any chunking and any number of threads draw the same ones.
#pragma once

#include "platform.h"

namespace signadam {

SIGNADAM_HD uint32_t mix(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  x ^= x >> 16;
  return x;
}

// The keys of one tensor at one step, before the element's high bits have entered.
struct RngKey {
  uint32_t h0, h1;

  SIGNADAM_HD static RngKey of(uint64_t seed, uint32_t tensor, uint64_t step) {
    const uint32_t words[] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), tensor,
                              static_cast<uint32_t>(step), static_cast<uint32_t>(step >> 32)};
    RngKey rng_keys{0x243F6A88u, 0x85A308D3u};
    for (const uint32_t w : words) rng_keys = {mix(rng_keys.h0 ^ w), mix(rng_keys.h1 ^ w)};
    return rng_keys;
  }
};

struct RngSubkey {
  uint32_t k0, k1;
  SIGNADAM_HD static RngSubkey of(const RngKey& rng_keys, uint32_t high) {
    return {mix(rng_keys.h0 ^ high), mix(rng_keys.h1 ^ high)};
  }
};

// One word serves two elements: its low half the even one, its high half the odd one.
SIGNADAM_HD uint32_t random_word(const RngSubkey& keys, uint32_t pair) {
  uint32_t x = pair ^ keys.k0;
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x = (x ^ keys.k1) * 0x846ca68bu;
  x ^= x >> 16;
  return x;
}

// What the moments use of an element's 16 bits: m the bytes swapped, v the complement of that, a third the complement
// of what the parameter uses.
SIGNADAM_HD uint32_t bits_for_m(uint32_t r) { return ((r << 8) | (r >> 8)) & 0xffffu; }
SIGNADAM_HD uint32_t bits_for_v(uint32_t r) { return bits_for_m(r) ^ 0xffffu; }
SIGNADAM_HD uint32_t bits_for_aux(uint32_t r) { return r ^ 0xffffu; }

}  // namespace signadam
