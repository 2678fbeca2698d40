// One operand of a chunk, read and written by pieces: the widest accesses its alignment allows.
#pragma once

#include "traversal.h"

namespace signadam {

// The bits of a piece as they lie in memory: one word per fp32, half a word per 16-bit element, and so on down.
struct Raw {
  uint32_t word[piece_size];
};

#if defined(__CUDA_ARCH__)
using Words = uint4;
SIGNADAM_HD Words load_words(const void* address) { return __ldcs(static_cast<const uint4*>(address)); }
SIGNADAM_HD void store_words(void* address, Words x) { __stcs(static_cast<uint4*>(address), x); }
#else
struct alignas(16) Words {
  uint32_t x, y, z, w;
};
SIGNADAM_HD Words load_words(const void* address) { return *static_cast<const Words*>(address); }
SIGNADAM_HD void store_words(void* address, Words x) { *static_cast<Words*>(address) = x; }
#endif

template <class T>
SIGNADAM_HD T load_one(const T* address) {
#if defined(__CUDA_ARCH__)
  return __ldcs(address);
#else
  return *address;
#endif
}

template <class T>
SIGNADAM_HD void store_one(T* address, T x) {
#if defined(__CUDA_ARCH__)
  __stcs(address, x);
#else
  *address = x;
#endif
}

// One tensor operand of a slice. Alignment and format are uniform over the chunk, so branches on them do not diverge.
struct Operand {
  unsigned char* begin;  // of the chunk
  Format format;
  bool aligned;  // whole pieces lie on 16-byte boundaries

  SIGNADAM_HD static Operand of(const void* base, Format format, const Slice& slice) {
    // One operand type serves reading and writing; gradients are only ever read.
    auto* begin = static_cast<unsigned char*>(const_cast<void*>(base)) + slice.begin * size_of(format);
    const auto border = reinterpret_cast<uintptr_t>(begin) + slice.tensor.head * size_of(format);
    return {begin, format, border % 16 == 0};
  }

  SIGNADAM_HD Raw load(const Piece& piece) const {
    Raw raw{};
    const unsigned char* at = begin + piece.begin * size_of(format);
    if (aligned && piece.whole()) {
      const Words low = load_words(at);
      raw.word[0] = low.x, raw.word[1] = low.y, raw.word[2] = low.z, raw.word[3] = low.w;
      if (format == Format::fp32) {
        const Words high = load_words(at + 16);
        raw.word[4] = high.x, raw.word[5] = high.y, raw.word[6] = high.z, raw.word[7] = high.w;
      }
      return raw;
    }
    SIGNADAM_UNROLL
    for (int i = 0; i < piece_size; ++i) {
      const int k = i - piece.offset;
      if (k < 0 || k >= piece.count) continue;
      if (format == Format::fp32)
        raw.word[i] = load_one(reinterpret_cast<const uint32_t*>(at) + k);
      else
        raw.word[i / 2] |= static_cast<uint32_t>(load_one(reinterpret_cast<const uint16_t*>(at) + k)) << (16 * (i % 2));
    }
    return raw;
  }

  SIGNADAM_HD void unpack(const Raw& raw, float* x) const {
    SIGNADAM_UNROLL
    for (int i = 0; i < piece_size; ++i)
      x[i] = format == Format::fp32 ? float_of(raw.word[i])
                                    : widen(format, static_cast<uint16_t>(raw.word[i / 2] >> (16 * (i % 2))));
  }

  SIGNADAM_HD void store(const Piece& piece, const float* x) const {
    Raw raw{};
    SIGNADAM_UNROLL
    for (int i = 0; i < piece_size; i += 2) {
      if (format == Format::fp32)
        raw.word[i] = bits_of(x[i]), raw.word[i + 1] = bits_of(x[i + 1]);
      else
        raw.word[i / 2] = narrow_two(format, x[i], x[i + 1]);
    }
    write(piece, raw);
  }

  SIGNADAM_HD void write(const Piece& piece, const Raw& raw) const {
    unsigned char* at = begin + piece.begin * size_of(format);
    if (aligned && piece.whole()) {
      store_words(at, Words{raw.word[0], raw.word[1], raw.word[2], raw.word[3]});
      if (format == Format::fp32) store_words(at + 16, Words{raw.word[4], raw.word[5], raw.word[6], raw.word[7]});
      return;
    }
    SIGNADAM_UNROLL
    for (int i = 0; i < piece_size; ++i) {
      const int k = i - piece.offset;
      if (k < 0 || k >= piece.count) continue;
      if (format == Format::fp32)
        store_one(reinterpret_cast<uint32_t*>(at) + k, raw.word[i]);
      else
        store_one(reinterpret_cast<uint16_t*>(at) + k, static_cast<uint16_t>(raw.word[i / 2] >> (16 * (i % 2))));
    }
  }
};

}  // namespace signadam
