// Storage formats and their conversion to and from fp32 registers.
#pragma once

#include "platform.h"

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#endif

namespace signadam {

enum class Format : uint8_t { fp32, bf16, fp16 };

SIGNADAM_HD constexpr int size_of(Format format) { return format == Format::fp32 ? 4 : 2; }

SIGNADAM_HD float widen_bf16(uint16_t x) { return float_of(static_cast<uint32_t>(x) << 16); }

// To nearest even; every NaN becomes 0x7fc0.
SIGNADAM_HD uint16_t narrow_bf16(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

SIGNADAM_HD float widen_fp16(uint16_t x) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(x));
#else
  const uint32_t sign = (x & 0x8000u) << 16;
  const uint32_t magnitude = (x & 0x7fffu) << 13;
  const uint32_t exponent = magnitude & 0x0f800000u;
  const uint32_t rebias = 112u << 23;
  // Infinity and NaN need the exponent raised twice. A subnormal is read as if it had the implicit bit, which the
  // subtraction then takes off exactly.
  const uint32_t finite = magnitude + rebias;
  const uint32_t special = finite + rebias;
  const uint32_t subnormal = bits_of(float_of(finite + (1u << 23)) - float_of(113u << 23));
  const uint32_t value = exponent == 0x0f800000u ? special : exponent == 0 ? subnormal : finite;
  return float_of(sign | value);
#endif
}

// To nearest even; overflow from 65520 on gives infinity.
SIGNADAM_HD uint16_t narrow_fp16(float x) {
#if defined(__CUDA_ARCH__)
  return __half_as_ushort(__float2half_rn(x));
#else
  const uint32_t bits = bits_of(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t odd = (magnitude >> 13) & 1u;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + odd) >> 13;
  // Adding 0.5 aligns the last bit of a result below 2^-14 with the last bit of fp32, so the addition rounds it.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  const uint32_t large = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t value = magnitude >= 0x47800000u ? large : magnitude < 0x38800000u ? subnormal : normal;
  return static_cast<uint16_t>(sign | value);
#endif
}

SIGNADAM_HD float widen(Format format, uint16_t x) { return format == Format::bf16 ? widen_bf16(x) : widen_fp16(x); }

SIGNADAM_HD uint16_t narrow(Format format, float x) { return format == Format::bf16 ? narrow_bf16(x) : narrow_fp16(x); }

}  // namespace signadam
