// Parameters and moments in every storage form, by pieces. Packed forms have no head: their pieces are whole words.
#pragma once

#include "operand.h"

namespace signadam {

// The 16 random bits of each element of a piece, two to a word.
struct RandomHalves {
  uint32_t word[piece_size / 2];
  SIGNADAM_HD uint32_t of(int i) const { return (word[i / 2] >> (16 * (i % 2))) & 0xffffu; }

  // `bits_for_m`, on a GPU one instruction.
  SIGNADAM_HD uint32_t for_m(int i) const {
#if defined(__CUDA_ARCH__)
    return __byte_perm(word[i / 2], 0, i % 2 == 0 ? 0x4401 : 0x4423);
#else
    return bits_for_m(of(i));
#endif
  }
};

struct PieceBits {
  RngKey rng_keys;
  RngSubkey keys;  // of the chunk's first element
  int64_t first;   // its index in the unsharded tensor

  SIGNADAM_HD static PieceBits of(const Slice& slice) {
    const int64_t first = slice.tensor.shard_offset + slice.begin;
    return {slice.rng_keys, RngSubkey::of(slice.rng_keys, static_cast<uint32_t>(first >> 33)), first};
  }

  SIGNADAM_HD uint32_t word(uint64_t pair) const {
    const auto high = static_cast<uint32_t>(pair >> 32);
    const bool usual = high == static_cast<uint32_t>(first >> 33);
    return random_word(usual ? keys : RngSubkey::of(rng_keys, high), static_cast<uint32_t>(pair));
  }

  // Whether the pieces of a full chunk without a head begin at multiples of their size, all under the same keys.
  SIGNADAM_HD bool even() const { return first % piece_size == 0 && first >> 33 == (first + chunk_size - 1) >> 33; }

  template <ChunkKind kind>
  SIGNADAM_HD RandomHalves at(const Piece& piece) const {
    if constexpr (kind == ChunkKind::any) {
      return at(piece);
    } else {
      // A multiple of four, so that what is added to it may as well be a part of the key.
      const uint32_t pair = static_cast<uint32_t>(first >> 1) + static_cast<uint32_t>(piece.begin) / 2;
      RandomHalves r;
      SIGNADAM_UNROLL
      for (uint32_t j = 0; j < piece_size / 2; ++j) r.word[j] = random_word({keys.k0 ^ j, keys.k1}, pair);
      return r;
    }
  }

  SIGNADAM_HD RandomHalves at(const Piece& piece) const {
    const int64_t begin = first + piece.begin - piece.offset;
    const auto pair = static_cast<uint64_t>(begin >> 1);
    RandomHalves r;
    SIGNADAM_UNROLL
    for (int j = 0; j < piece_size / 2; ++j) r.word[j] = word(pair + j);
    if (begin % 2 != 0) {
      const uint32_t last = word(pair + piece_size / 2);
      SIGNADAM_UNROLL
      for (int j = 0; j < piece_size / 2; ++j)
        r.word[j] = (r.word[j] >> 16) | ((j + 1 < piece_size / 2 ? r.word[j + 1] : last) << 16);
    }
    return r;
  }
};

struct ParamRaw {
  Raw param, residual;
};

struct StoredParam {
  Operand param;
  unsigned char* residual;  // of the chunk
  ParamStorage param_storage;
  bool aligned;  // whether whole pieces of what lies beside are on 8-byte boundaries

  SIGNADAM_HD static StoredParam of(const Slice& slice) {
    const Formats& formats = slice.tensor.formats;
    const int size = residual_size(formats.param_storage);
    auto* residual = static_cast<unsigned char*>(slice.tensor.residual) + slice.begin * size;
    const auto border = reinterpret_cast<uintptr_t>(residual) + slice.tensor.head * size;
    return {Operand::of(slice.tensor.param, formats.param, slice), residual, formats.param_storage, border % 8 == 0};
  }

  SIGNADAM_HD static int residual_size(ParamStorage param_storage) {
    return param_storage == ParamStorage::master    ? 4
           : param_storage == ParamStorage::split16 ? 2
           : param_storage == ParamStorage::split8  ? 1
                                                    : 0;
  }

  // What lies beside the parameter has one width and its own alignment: one 8-byte access moves a piece of split8, two
  // or four the others'.
  SIGNADAM_HD ParamRaw load(const Piece& piece) const {
    ParamRaw raw{param.load(piece), {}};
    const int size = residual_size(param_storage);
    if (size == 0) return raw;
    const unsigned char* at = residual + static_cast<int64_t>(piece.begin) * size;
    if (piece.whole() && aligned) {
      SIGNADAM_UNROLL
      for (int w = 0; w < 4; ++w)
        if (w < size) {
          const uint64_t two = load_one(reinterpret_cast<const uint64_t*>(at) + w);
          raw.residual.word[2 * w] = static_cast<uint32_t>(two);
          raw.residual.word[2 * w + 1] = static_cast<uint32_t>(two >> 32);
        }
      return raw;
    }
    SIGNADAM_UNROLL
    for (int i = 0; i < piece_size; ++i) {
      const int k = i - piece.offset;
      if (k < 0 || k >= piece.count) continue;
      if (size == 4)
        raw.residual.word[i] = load_one(reinterpret_cast<const uint32_t*>(at) + k);
      else if (size == 2)
        raw.residual.word[i / 2] |= static_cast<uint32_t>(load_one(reinterpret_cast<const uint16_t*>(at) + k))
                                    << 16 * (i % 2);
      else
        raw.residual.word[i / 4] |= static_cast<uint32_t>(load_one(at + k)) << 8 * (i % 4);
    }
    return raw;
  }

  SIGNADAM_HD void unpack(const ParamRaw& raw, float* p) const {
    param.unpack(raw.param, p);
    SIGNADAM_UNROLL
    for (int i = 0; i < piece_size; ++i) {
      const auto high = static_cast<uint16_t>(raw.param.word[i / 2] >> (16 * (i % 2)));
      if (param_storage == ParamStorage::master)
        p[i] = from_master(param.format, high, float_of(raw.residual.word[i]));
      else if (param_storage == ParamStorage::split16)
        p[i] = join(high, static_cast<int16_t>(raw.residual.word[i / 2] >> (16 * (i % 2))));
      else if (param_storage == ParamStorage::split8)
        p[i] = join(high, 256 * static_cast<int8_t>(raw.residual.word[i / 4] >> (8 * (i % 4))));
    }
  }

  SIGNADAM_HD void store(const Piece& piece, const float* p, const RandomHalves& r) const {
    if (param_storage == ParamStorage::nearest) return param.store(piece, p);
    ParamRaw raw{};
    if (param_storage == ParamStorage::stochastic) {
      SIGNADAM_UNROLL
      for (int i = 0; i < piece_size; i += 2)
        raw.param.word[i / 2] = narrow_two(param.format, p[i], p[i + 1], r.of(i), r.of(i + 1));
      return param.write(piece, raw.param);
    }
    if (param_storage == ParamStorage::master) {
      SIGNADAM_UNROLL
      for (int i = 0; i < piece_size; i += 2) {
        raw.param.word[i / 2] = narrow_two(param.format, p[i], p[i + 1]);
        raw.residual.word[i] = bits_of(p[i]), raw.residual.word[i + 1] = bits_of(p[i + 1]);
      }
    } else {
      SIGNADAM_UNROLL
      for (int i = 0; i < piece_size; ++i) {
        const bool wide = param_storage == ParamStorage::split16;
        const Split split = wide ? split16(p[i]) : split8(p[i], r.of(i) >> 8);
        raw.param.word[i / 2] |= static_cast<uint32_t>(split.high) << (16 * (i % 2));
        if (wide)
          raw.residual.word[i / 2] |= (static_cast<uint32_t>(split.remainder) & 0xffffu) << (16 * (i % 2));
        else
          raw.residual.word[i / 4] |= (static_cast<uint32_t>(split.remainder) & 0xffu) << (8 * (i % 4));
      }
    }
    param.write(piece, raw.param);
    const int size = residual_size(param_storage);
    unsigned char* at = residual + static_cast<int64_t>(piece.begin) * size;
    if (piece.whole() && aligned) {
      SIGNADAM_UNROLL
      for (int w = 0; w < 4; ++w)
        if (w < size)
          store_one(reinterpret_cast<uint64_t*>(at) + w,
                    raw.residual.word[2 * w] | static_cast<uint64_t>(raw.residual.word[2 * w + 1]) << 32);
      return;
    }
    SIGNADAM_UNROLL
    for (int i = 0; i < piece_size; ++i) {
      const int k = i - piece.offset;
      if (k < 0 || k >= piece.count) continue;
      if (size == 4)
        store_one(reinterpret_cast<uint32_t*>(at) + k, raw.residual.word[i]);
      else if (size == 2)
        store_one(reinterpret_cast<uint16_t*>(at) + k,
                  static_cast<uint16_t>(raw.residual.word[i / 2] >> (16 * (i % 2))));
      else
        store_one(at + k, static_cast<unsigned char>(raw.residual.word[i / 4] >> (8 * (i % 4))));
    }
  }
};

// A moment in fp32 or bf16, as all but the first are.
struct WideMoment {
  Operand at;

  SIGNADAM_HD static WideMoment of(void* base, Format format, const Slice& slice) {
    return {Operand::of(base, format, slice)};
  }
  SIGNADAM_HD Raw load(const Piece& piece) const { return at.load(piece); }
  SIGNADAM_HD void unpack(const Raw& raw, float* x) const { at.unpack(raw, x); }

  // `random(i)`: 16 bits for element i.
  template <class Random>
  SIGNADAM_HD void store(const Piece& piece, const float* x, Random random) const {
    if (at.format == Format::fp32) return at.store(piece, x);
    Raw raw{};
    SIGNADAM_UNROLL
    for (int i = 0; i < piece_size; i += 2)
      raw.word[i / 2] = narrow_two(Format::bf16, x[i], x[i + 1], random(i), random(i + 1));
    at.write(piece, raw);
  }
};

// The first moment, in any form. Codes lie in storage that is padded to whole runs, so their pieces are always whole.
struct StoredMoment {
  WideMoment wide;  // of fp32 and bf16
  Format format;
  unsigned char* codes;  // of the chunk
  int8_t* exponents;     // of the chunk, with block8

  SIGNADAM_HD static StoredMoment of(void* base, Format format, const Slice& slice) {
    if (!is_packed(format)) return {WideMoment::of(base, format, slice), format, nullptr, nullptr};
    return {{{nullptr, Format::fp32, false}},
            format,
            static_cast<unsigned char*>(base) + bytes_before(format, slice.begin),
            exponent_at(base, slice.tensor.numel, slice.begin)};
  }

  SIGNADAM_HD Raw load(const Piece& piece, int index) const {
    if (!is_packed(format)) return wide.load(piece);
    Raw raw{};
    const unsigned char* at = codes + index * bits_of(format);
    if (bits_of(format) == 8) {
      const uint64_t two = load_one(reinterpret_cast<const uint64_t*>(at));
      raw.word[0] = static_cast<uint32_t>(two);
      raw.word[1] = static_cast<uint32_t>(two >> 32);
      if (format == Format::block8)
        raw.word[2] = static_cast<uint32_t>(127 + load_one(exponents + index / (packed_run / piece_size)));
    } else if (format == Format::int4) {
      raw.word[0] = load_one(reinterpret_cast<const uint32_t*>(at));
    } else {
      raw.word[0] = load_one(reinterpret_cast<const uint16_t*>(at));
    }
    return raw;
  }

  SIGNADAM_HD void unpack(const Raw& raw, float* x) const {
    if (!is_packed(format)) return wide.unpack(raw, x);
    const float scale = format == Format::block8 ? float_of(raw.word[2] << 23) : 1.0f;
    SIGNADAM_UNROLL
    for (int i = 0; i < piece_size; ++i) {
      // The code, moved to the top of a word, and brought down with its sign.
      const int32_t q = format == Format::int4   ? static_cast<int32_t>(raw.word[0] << (28 - 4 * i)) >> 28
                        : format == Format::int2 ? static_cast<int32_t>(raw.word[0] << (30 - 2 * i)) >> 30
                                                 : static_cast<int32_t>(raw.word[i / 4] << (24 - 8 * (i % 4))) >> 24;
      x[i] = format == Format::block8 ? from_block_code(q, scale) : static_cast<float>(q);
    }
  }

  // `random(i)`: 16 bits for element i.
  template <class Random>
  SIGNADAM_HD void store(const Piece& piece, int index, const float* x, Random random) const {
    if (!is_packed(format)) return wide.store(piece, x, random);
    const int bits = bits_of(format);
    uint32_t above[piece_size];
    SIGNADAM_UNROLL
    for (int i = 0; i < piece_size; ++i) above[i] = stochastic_integer_above(x[i], random(i));
    const PackedCodes packed = pack_codes(bits, above);
    unsigned char* at = codes + index * bits;
    if (bits == 8)
      store_one(reinterpret_cast<uint64_t*>(at), packed.low | static_cast<uint64_t>(packed.high) << 32);
    else if (bits == 4)
      store_one(reinterpret_cast<uint32_t*>(at), packed.low);
    else
      store_one(reinterpret_cast<uint16_t*>(at), static_cast<uint16_t>(packed.low));
  }

  // A piece as codes of the block whose largest finite magnitude has these bits, and the exponent by its first piece.
  SIGNADAM_HD void store_scaled(int index, const float* x, const RandomHalves& r, uint32_t largest) const {
    const int e = block_exponent(largest);
    const float inverse = power_of_two(-e);
    uint32_t word[2] = {};
    SIGNADAM_UNROLL
    for (int i = 0; i < piece_size; ++i) {
      const int32_t q = block_code(x[i], inverse, r.for_m(i));
      word[i / 4] |= (static_cast<uint32_t>(q) & 0xffu) << (8 * (i % 4));
    }
    store_one(reinterpret_cast<uint64_t*>(codes + index * piece_size), word[0] | static_cast<uint64_t>(word[1]) << 32);
    constexpr int pieces = packed_run / piece_size;
    if (index % pieces == 0) store_one(exponents + index / pieces, static_cast<int8_t>(e));
  }
};

// A piece of m between the update and the exponent that it shares with three others.
struct PendingMoment {
  float m[piece_size];
  RandomHalves r;

  // Keeps a piece and what it is rounded with. Returns the bits of its largest finite magnitude.
  SIGNADAM_HD uint32_t keep(const float* from, const RandomHalves& with) {
    r = with;
    uint32_t largest = 0;
    SIGNADAM_UNROLL
    for (int i = 0; i < piece_size; ++i) {
      m[i] = from[i];
      const uint32_t magnitude = finite_magnitude(from[i]);
      largest = magnitude > largest ? magnitude : largest;
    }
    return largest;
  }
};

// The operands of a slice in any storage form.
struct StoredOperands {
  StoredParam param;
  Operand grad;
  StoredMoment exp_avg;
  WideMoment exp_avg_sq, exp_third;
  PieceBits rng_keys;

  SIGNADAM_HD static StoredOperands of(const Slice& slice) {
    const TensorEntry& tensor = slice.tensor;
    return {StoredParam::of(slice),
            Operand::of(slice.grad, tensor.formats.grad, slice),
            StoredMoment::of(tensor.exp_avg, tensor.formats.exp_avg, slice),
            WideMoment::of(tensor.exp_avg_sq, tensor.formats.exp_avg_sq, slice),
            WideMoment::of(tensor.aux, tensor.formats.aux, slice),
            PieceBits::of(slice)};
  }
};

}  // namespace signadam
