// Storage formats and their conversion to and from fp32 registers.
#pragma once

#include "platform.h"

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#endif

namespace signadam {

// int8, int4, int2: codes q of a moment m ~ q / L. block8: 8-bit codes with one exponent for each 32. Checkpoints hold
// the numbers of packed formats: a new one goes to the end.
#define SIGNADAM_FORMATS(X) X(fp32) X(bf16) X(fp16) X(int8) X(int4) X(int2) X(block8)
#define SIGNADAM_NAME(name) name,
enum class Format : uint8_t { SIGNADAM_FORMATS(SIGNADAM_NAME) };

SIGNADAM_HD constexpr int bits_of(Format format) {
  return format == Format::fp32                               ? 32
         : format == Format::bf16 || format == Format::fp16   ? 16
         : format == Format::int8 || format == Format::block8 ? 8
         : format == Format::int4                             ? 4
                                                              : 2;
}

// Whether elements share bytes or a scale, so that storage is padded to whole runs of `packed_run`.
SIGNADAM_HD constexpr bool is_packed(Format format) { return bits_of(format) <= 8; }
constexpr int packed_run = 32;
SIGNADAM_HD constexpr int64_t padded(int64_t count) { return (count + packed_run - 1) / packed_run * packed_run; }

// Whether elements are codes without a scale, of a moment that never exceeds 1.
SIGNADAM_HD constexpr bool is_scale_free(Format format) { return is_packed(format) && format != Format::block8; }

// Bytes before element `index`; of packed formats, `index` must be a multiple of 8.
SIGNADAM_HD constexpr int64_t bytes_before(Format format, int64_t index) { return index * bits_of(format) / 8; }

// Bytes of one element of a format that is not packed.
SIGNADAM_HD constexpr int size_of(Format format) { return format == Format::fp32 ? 4 : 2; }

// How the fp32 result of a step is kept (docs/numerics.md): rounded to nearest; stochastically; with the low 16
// or 8 bits beside it; as a copy in fp32.
#define SIGNADAM_PARAM_STORAGES(X) X(nearest) X(stochastic) X(split16) X(split8) X(master)
enum class ParamStorage : uint8_t { SIGNADAM_PARAM_STORAGES(SIGNADAM_NAME) };
#undef SIGNADAM_NAME

SIGNADAM_HD float widen_bf16(uint16_t x) { return float_of(static_cast<uint32_t>(x) << 16); }

// To nearest even; every NaN becomes 0x7fc0.
SIGNADAM_HD uint16_t narrow_bf16(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(x != x ? 0x7fc0u : rounded);
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

// Stochastic rounding: up with the probability that is the fraction cut off. `r` is uniform in 16 bits.
SIGNADAM_HD uint16_t narrow_bf16(float x, uint32_t r) {
  return static_cast<uint16_t>(x != x ? 0x7fc0u : (bits_of(x) + r) >> 16);
}

// In units of the result's own last place; overflow gives infinity only above 65520.
SIGNADAM_HD uint16_t narrow_fp16(float x, uint32_t r) {
  const uint32_t bits = bits_of(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - (112u << 23) + (r >> 3)) >> 13;
  // Below 2^-14 the last place is 2^-24: in units of 2^-40 this fits an integer.
  const float small = magnitude < 0x38800000u ? float_of(magnitude) * 0x1p40f : 0.0f;
  const uint32_t subnormal = (static_cast<uint32_t>(static_cast<int32_t>(small)) + r) >> 16;
  const uint32_t large = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t rounded = magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t finite = magnitude <= 0x477ff000u && rounded >= 0x7c00u ? 0x7bffu : rounded;
  return static_cast<uint16_t>(sign | (magnitude >= 0x47800000u ? large : finite));
}

// The integer next to x, up with the probability of the fraction; |x| at most 127 or a rounding more. In the upper half
// of a word, above what is cut off.
SIGNADAM_HD uint32_t stochastic_integer_above(float x, uint32_t r) {
  return static_cast<uint32_t>(static_cast<int32_t>(x * 65536.0f)) + r;
}

SIGNADAM_HD int32_t stochastic_integer(float x, uint32_t r) {
  return static_cast<int32_t>(stochastic_integer_above(x, r)) >> 16;
}

// A bf16 parameter and what fp32 has beyond it.
struct Split {
  uint16_t high;
  int32_t remainder;
};

// Rounds half up: a tie to even would need a remainder of +0x8000, which does not fit.
SIGNADAM_HD Split split16(float x) {
  const uint32_t bits = bits_of(x);
  const bool nan = x != x;
  const uint32_t high = (bits + 0x8000u) >> 16;
  return {static_cast<uint16_t>(nan ? 0x7fc0u : high), nan ? 0 : static_cast<int32_t>(bits - (high << 16))};
}

// The same on 24 bits, to which x is rounded stochastically by 8 random bits.
SIGNADAM_HD Split split8(float x, uint32_t r) {
  const uint32_t bits = bits_of(x);
  const bool nan = x != x;
  const uint32_t kept = (bits + r) >> 8;
  const uint32_t high = (kept + 0x80u) >> 8;
  return {static_cast<uint16_t>(nan ? 0x7fc0u : high), nan ? 0 : static_cast<int32_t>(kept - (high << 8))};
}

// `remainder` in units of fp32's last place. A parameter set from outside may leave low bits behind that make a NaN of
// a zero or an infinity: the parameter wins.
SIGNADAM_HD float join(uint16_t high, int32_t remainder) {
  const float joined = float_of((static_cast<uint32_t>(high) << 16) + static_cast<uint32_t>(remainder));
  return joined != joined ? widen_bf16(high) : joined;
}

// Block-scaled codes: the smallest e in [-126, 120] with 127 * 2^e at least the largest finite magnitude of the block.
SIGNADAM_HD int block_exponent(uint32_t largest_bits) {
  const int e = static_cast<int>((largest_bits + 0x1ffffu) >> 23) - 133;
  return e < -126 ? -126 : e > 120 ? 120 : e;
}

SIGNADAM_HD float power_of_two(int e) { return float_of(static_cast<uint32_t>(e + 127) << 23); }

// Bits of |x|, or 0 where x is not finite.
SIGNADAM_HD uint32_t finite_magnitude(float x) {
  const uint32_t magnitude = bits_of(x) & 0x7fffffffu;
  return magnitude < 0x7f800000u ? magnitude : 0u;
}

// The exponent of the block that begins at element `index`: behind all codes of the tensor.
SIGNADAM_HD int8_t* exponent_at(void* codes, int64_t numel, int64_t index) {
  return static_cast<int8_t*>(codes) + padded(numel) + index / packed_run;
}

constexpr int32_t nan_code = -128;

// `inverse`: 2^-e. Infinities saturate.
SIGNADAM_HD int32_t block_code(float x, float inverse, uint32_t r) {
  const bool nan = x != x;
  float scaled = nan ? 0.0f : x * inverse;
  scaled = scaled > 127.0f ? 127.0f : scaled < -127.0f ? -127.0f : scaled;
  const int32_t q = stochastic_integer(scaled, r);
  return nan ? nan_code : q;
}

SIGNADAM_HD float from_block_code(int32_t q, float scale) {
  return q == nan_code ? float_of(0x7fc00000u) : static_cast<float>(q) * scale;
}

SIGNADAM_HD float widen(Format format, uint16_t x) { return format == Format::bf16 ? widen_bf16(x) : widen_fp16(x); }

SIGNADAM_HD uint16_t narrow(Format format, float x) { return format == Format::bf16 ? narrow_bf16(x) : narrow_fp16(x); }

SIGNADAM_HD uint16_t narrow(Format format, float x, uint32_t r) {
  return format == Format::bf16 ? narrow_bf16(x, r) : narrow_fp16(x, r);
}

// Two neighbours in a word, the first below.
SIGNADAM_HD uint32_t narrow_two(Format format, float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  // One conversion of both. A NaN becomes 0x7fff.
  uint32_t word;
  if (format == Format::bf16)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
#else
  return narrow(format, low) | static_cast<uint32_t>(narrow(format, high)) << 16;
#endif
}

// `r_low`, `r_high`: 16 random bits for each.
SIGNADAM_HD uint32_t narrow_two(Format format, float low, float high, uint32_t r_low, uint32_t r_high) {
  if (format == Format::fp16) return narrow_fp16(low, r_low) | static_cast<uint32_t>(narrow_fp16(high, r_high)) << 16;
  const uint32_t sum_low = low != low ? 0x7fc00000u : bits_of(low) + r_low;
  const uint32_t sum_high = high != high ? 0x7fc00000u : bits_of(high) + r_high;
  return upper_halves(sum_low, sum_high);
}

// Eight codes of 8, 4 or 2 bits side by side, given in the upper halves of words.
struct PackedCodes {
  uint32_t low, high;  // `high` of 8 bits alone
};

SIGNADAM_HD PackedCodes pack_codes(int bits, const uint32_t* above) {
  if (bits == 8)
    return {lower_halves(third_bytes(above[0], above[1]), third_bytes(above[2], above[3])),
            lower_halves(third_bytes(above[4], above[5]), third_bytes(above[6], above[7]))};
  // Elements i and i + 4 in the halves of a word, those of the next i beside them.
  const uint32_t mask = bits == 4 ? 0x000f000fu : 0x00030003u;
  uint32_t packed = 0;
  SIGNADAM_UNROLL
  for (int i = 0; i < 4; ++i) packed |= (upper_halves(above[i], above[i + 4]) & mask) << (bits * i);
  return {bits == 4 ? packed : (packed & 0xffu) | (packed >> 8 & 0xff00u), 0};
}

// A master copy counts only while the parameter is what it rounds to: a parameter set from outside wins.
SIGNADAM_HD float from_master(Format format, uint16_t param, float master) {
  return narrow(format, master) == param ? master : widen(format, param);
}

}  // namespace signadam
