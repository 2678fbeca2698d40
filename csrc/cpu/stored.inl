// Included by kernels.inl, inside its namespace: storage forms to and from fp32 scratch, a block at a time. Loops do
// one thing each, over arrays in the first-level cache, so that every compiler makes vectors of them.

static_assert(block_size % packed_run == 0);

// The 16 random bits of each element, and room for the pairs that stick out at both ends.
struct Halves {
  alignas(64) uint32_t word[block_size / 2 + 1];
  alignas(64) uint16_t gathered[block_size];  // of several runs of a shard
};

void draw_run(const RngSubkey keys, uint32_t pair, uint32_t* SIGNADAM_RESTRICT words, int count) {
  for (int i = 0; i < count; ++i) words[i] = random_word(keys, pair + static_cast<uint32_t>(i));
}

// `first`: index in the unsharded tensor. Returns the bits of element 0.
const uint16_t* draw(const RngKey& rng_keys, int64_t first, int count, Halves& halves) {
  const auto pair = static_cast<uint64_t>(first) >> 1;
  const int words = (count + static_cast<int>(first & 1) + 1) / 2;
  // Keys hold for 2^32 pairs.
  const uint64_t left = (uint64_t{1} << 32) - (pair & 0xffffffffu);
  const int low = left < static_cast<uint64_t>(words) ? static_cast<int>(left) : words;
  draw_run(RngSubkey::of(rng_keys, static_cast<uint32_t>(pair >> 32)), static_cast<uint32_t>(pair), halves.word, low);
  if (low < words)
    draw_run(RngSubkey::of(rng_keys, static_cast<uint32_t>(pair >> 32) + 1), 0, halves.word + low, words - low);
  return reinterpret_cast<const uint16_t*>(halves.word) + (first & 1);
}

// The same from element `index` of a part on, run by run where it is several.
const uint16_t* draw(const RngKey& rng_keys, const TensorEntry& tensor, int64_t index, int count, Halves& halves) {
  const ShardRuns& runs = tensor.runs;
  if (runs.run == 0) return draw(rng_keys, tensor.shard_offset + index, count, halves);
  for (int done = 0; done < count;) {
    const int64_t rest = runs.run - (index + done) % runs.run;
    const int length = rest < count - done ? static_cast<int>(rest) : count - done;
    const uint16_t* const drawn = draw(rng_keys, tensor.shard_offset + runs.place(index + done), length, halves);
    std::memcpy(halves.gathered + done, drawn, sizeof(uint16_t) * static_cast<std::size_t>(length));
    done += length;
  }
  return halves.gathered;
}

float* load_param(const TensorEntry& tensor, int64_t index, float* SIGNADAM_RESTRICT to, int count) {
  const Formats& formats = tensor.formats;
  float* const p = const_cast<float*>(widened(tensor.param, formats.param, index, to, count));
  if (formats.param_storage == ParamStorage::nearest || formats.param_storage == ParamStorage::stochastic) return p;
  const uint16_t* SIGNADAM_RESTRICT param = static_cast<const uint16_t*>(tensor.param) + index;
  if (formats.param_storage == ParamStorage::master) {
    const float* SIGNADAM_RESTRICT master = static_cast<const float*>(tensor.residual) + index;
    if (formats.param == Format::bf16)
      for (int i = 0; i < count; ++i) to[i] = from_master(Format::bf16, param[i], master[i]);
    else
      for (int i = 0; i < count; ++i) to[i] = from_master(Format::fp16, param[i], master[i]);
  } else if (formats.param_storage == ParamStorage::split16) {
    const int16_t* SIGNADAM_RESTRICT remainder = static_cast<const int16_t*>(tensor.residual) + index;
    for (int i = 0; i < count; ++i) to[i] = join(param[i], remainder[i]);
  } else {
    const int8_t* SIGNADAM_RESTRICT remainder = static_cast<const int8_t*>(tensor.residual) + index;
    for (int i = 0; i < count; ++i) to[i] = join(param[i], 256 * remainder[i]);
  }
  return p;
}

void store_param(const TensorEntry& tensor, int64_t index, const float* SIGNADAM_RESTRICT p,
                 const uint16_t* SIGNADAM_RESTRICT r, int count) {
  const Formats& formats = tensor.formats;
  if (formats.param == Format::fp32) return;
  uint16_t* SIGNADAM_RESTRICT param = static_cast<uint16_t*>(tensor.param) + index;
  switch (formats.param_storage) {
    case ParamStorage::nearest:
      narrow_block(formats.param, p, param, count);
      return;
    case ParamStorage::stochastic:
      if (formats.param == Format::bf16)
        for (int i = 0; i < count; ++i) param[i] = narrow_bf16(p[i], r[i]);
      else
        for (int i = 0; i < count; ++i) param[i] = narrow_fp16(p[i], r[i]);
      return;
    case ParamStorage::master: {
      float* SIGNADAM_RESTRICT master = static_cast<float*>(tensor.residual) + index;
      for (int i = 0; i < count; ++i) master[i] = p[i];
      narrow_block(formats.param, p, param, count);
      return;
    }
    case ParamStorage::split16: {
      int16_t* SIGNADAM_RESTRICT remainder = static_cast<int16_t*>(tensor.residual) + index;
      for (int i = 0; i < count; ++i) {
        const Split split = split16(p[i]);
        param[i] = split.high;
        remainder[i] = static_cast<int16_t>(split.remainder);
      }
      return;
    }
    case ParamStorage::split8: {
      int8_t* SIGNADAM_RESTRICT remainder = static_cast<int8_t*>(tensor.residual) + index;
      for (int i = 0; i < count; ++i) {
        const Split split = split8(p[i], static_cast<uint32_t>(r[i]) >> 8);
        param[i] = split.high;
        remainder[i] = static_cast<int8_t>(split.remainder);
      }
    }
  }
}

// Four codes in a word of bytes <-> side by side in an integer that they fill: neighbours move together, then pairs.
template <class Packed>
struct FourCodes {
  static constexpr int bits = 2 * sizeof(Packed);
  static constexpr uint32_t ones = ((1u << bits) - 1) * 0x01010101u, pairs = ((1u << 2 * bits) - 1) * 0x00010001u;

  static uint32_t spread(uint32_t x) {
    x = (x | x << 2 * (8 - bits)) & pairs;
    return (x | x << (8 - bits)) & ones;
  }

  static Packed packed(uint32_t x) {
    x &= ones;
    x = (x | x >> (8 - bits)) & pairs;
    return static_cast<Packed>(x | x >> 2 * (8 - bits));
  }
};

template <class Packed>
void unpack_codes(const unsigned char* SIGNADAM_RESTRICT from, int8_t* SIGNADAM_RESTRICT to, int count) {
  const int words = static_cast<int>(padded(count)) / 4;
  Packed packed[block_size / 4];
  alignas(64) uint32_t spread[block_size / 4];
  std::memcpy(packed, from, sizeof(Packed) * static_cast<std::size_t>(words));
  for (int i = 0; i < words; ++i) spread[i] = FourCodes<Packed>::spread(packed[i]);
  std::memcpy(to, spread, sizeof(uint32_t) * static_cast<std::size_t>(words));
  constexpr int sign = 1 << (FourCodes<Packed>::bits - 1);
  for (int i = 0; i < 4 * words; ++i) to[i] = static_cast<int8_t>((to[i] ^ sign) - sign);
}

template <class Packed>
void pack_codes(const int8_t* SIGNADAM_RESTRICT from, unsigned char* SIGNADAM_RESTRICT to, int count) {
  const int words = static_cast<int>(padded(count)) / 4;
  Packed packed[block_size / 4];
  alignas(64) uint32_t spread[block_size / 4];
  std::memcpy(spread, from, sizeof(uint32_t) * static_cast<std::size_t>(words));
  for (int i = 0; i < words; ++i) packed[i] = FourCodes<Packed>::packed(spread[i]);
  std::memcpy(to, packed, sizeof(Packed) * static_cast<std::size_t>(words));
}

// One value for a whole run, so that loops over elements need not know of runs.
void fill_run(float* to, float value) {
  for (int i = 0; i < packed_run; ++i) to[i] = value;
}

// fp32 is used where it lies.
float* load_moment(void* base, Format format, int64_t numel, int64_t index, float* SIGNADAM_RESTRICT to, int count) {
  auto* const from = static_cast<unsigned char*>(base) + bytes_before(format, index);
  if (!is_packed(format)) return const_cast<float*>(widened(base, format, index, to, count));
  if (format == Format::block8) {
    alignas(64) float scales[block_size];
    const int8_t* SIGNADAM_RESTRICT codes = reinterpret_cast<const int8_t*>(from);
    const int8_t* exponents = exponent_at(base, numel, index);
    for (int run = 0; run < count; run += packed_run) fill_run(scales + run, power_of_two(exponents[run / packed_run]));
    for (int i = 0; i < count; ++i) to[i] = from_block_code(codes[i], scales[i]);
    return to;
  }
  alignas(64) int8_t unpacked[block_size];
  const int8_t* codes = reinterpret_cast<const int8_t*>(from);
  if (bits_of(format) < 8) {
    if (bits_of(format) == 4)
      unpack_codes<uint16_t>(from, unpacked, count);
    else
      unpack_codes<uint8_t>(from, unpacked, count);
    codes = unpacked;
  }
  for (int i = 0; i < count; ++i) to[i] = static_cast<float>(codes[i]);
  return to;
}

// `which`: 0 for the bits of m, 1 for those of v, 2 for those of the third moment.
template <int which>
SIGNADAM_HD uint32_t moment_bits(uint16_t r) {
  return which == 0 ? bits_for_m(r) : which == 1 ? bits_for_v(r) : bits_for_aux(r);
}

template <int which>
void store_moment(void* base, Format format, int64_t numel, int64_t index, float* SIGNADAM_RESTRICT m,
                  const uint16_t* SIGNADAM_RESTRICT r, int count) {
  auto* const to = static_cast<unsigned char*>(base) + bytes_before(format, index);
  if (format == Format::fp32) return;
  if (format == Format::bf16) {
    uint16_t* SIGNADAM_RESTRICT bf16 = reinterpret_cast<uint16_t*>(to);
    for (int i = 0; i < count; ++i) bf16[i] = narrow_bf16(m[i], moment_bits<which>(r[i]));
    return;
  }
  // Packed storage ends with a whole run: what lies beyond the tensor in it is zero.
  const int whole = static_cast<int>(padded(count));
  alignas(64) int8_t codes[block_size];
  if (format == Format::block8) {
    alignas(64) float inverses[block_size];
    int8_t* exponents = exponent_at(base, numel, index);
    for (int i = count; i < whole; ++i) m[i] = 0.0f;
    for (int run = 0; run < whole; run += packed_run) {
      int32_t largest = 0;  // signed, for which AVX2 has a maximum that compilers know
      for (int i = run; i < run + packed_run; ++i) {
        const auto magnitude = static_cast<int32_t>(finite_magnitude(m[i]));
        largest = largest > magnitude ? largest : magnitude;
      }
      const int e = block_exponent(static_cast<uint32_t>(largest));
      exponents[run / packed_run] = static_cast<int8_t>(e);
      fill_run(inverses + run, power_of_two(-e));
    }
    for (int i = 0; i < whole; ++i)
      codes[i] = static_cast<int8_t>(block_code(m[i], inverses[i], moment_bits<which>(r[i])));
    std::memcpy(to, codes, static_cast<std::size_t>(whole));
    return;
  }
  for (int i = 0; i < count; ++i) codes[i] = static_cast<int8_t>(stochastic_integer(m[i], moment_bits<which>(r[i])));
  for (int i = count; i < whole; ++i) codes[i] = 0;
  if (bits_of(format) == 8)
    std::memcpy(to, codes, static_cast<std::size_t>(whole));
  else if (bits_of(format) == 4)
    pack_codes<uint16_t>(codes, to, count);
  else
    pack_codes<uint8_t>(codes, to, count);
}
