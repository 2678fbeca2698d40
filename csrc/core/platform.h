// What differs between a host compiler and nvcc, in one place.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define SIGNADAM_HD __host__ __device__ __forceinline__
#define SIGNADAM_UNROLL _Pragma("unroll")
#define SIGNADAM_ROLLED _Pragma("unroll 1")
#else
#define SIGNADAM_HD inline __attribute__((always_inline))
#define SIGNADAM_UNROLL
#define SIGNADAM_ROLLED
#endif

#define SIGNADAM_RESTRICT __restrict__

// A loop over memory on the host. In a function of its own it has all registers; a compiler that joins those that are
// called once gives them the stack.
#define SIGNADAM_APART __attribute__((noinline))

namespace signadam {

SIGNADAM_HD uint32_t bits_of(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
#endif
}

SIGNADAM_HD float float_of(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
#endif
}

SIGNADAM_HD double double_root(double x) {
#if defined(__CUDA_ARCH__)
  return __dsqrt_rn(x);
#else
  return __builtin_sqrt(x);
#endif
}

// Bytes of two words, the first word's below. On a GPU each is one instruction.
#if defined(__CUDA_ARCH__)
SIGNADAM_HD uint32_t upper_halves(uint32_t low, uint32_t high) { return __byte_perm(low, high, 0x7632); }
SIGNADAM_HD uint32_t lower_halves(uint32_t low, uint32_t high) { return __byte_perm(low, high, 0x5410); }
SIGNADAM_HD uint32_t third_bytes(uint32_t low, uint32_t high) { return __byte_perm(low, high, 0x0062) & 0xffffu; }
#else
SIGNADAM_HD uint32_t upper_halves(uint32_t low, uint32_t high) { return (low >> 16) | (high & 0xffff0000u); }
SIGNADAM_HD uint32_t lower_halves(uint32_t low, uint32_t high) { return (low & 0xffffu) | (high << 16); }
SIGNADAM_HD uint32_t third_bytes(uint32_t low, uint32_t high) { return (low >> 16 & 0xffu) | (high >> 8 & 0xff00u); }
#endif

}  // namespace signadam
