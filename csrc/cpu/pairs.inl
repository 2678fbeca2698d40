// Included by kernels.inl, inside its namespace: bf16 parameters and gradients with moments of 16 or fewer bits, where
// two elements share every word of the tensors, and one word of random bits. So they are widened, rounded and put back
// together as the even and the odd ones, without a shuffle. What this does not take goes by way of fused.inl.

// Two vectors of elements that lie side by side in words.
struct Pairs {
  V even, odd;
};

#if defined(__AVX512BW__)

// Bytes of each 128-bit lane, in the order of these four words.
SIGNADAM_HD __m512i shuffled(U x, uint32_t w0, uint32_t w1, uint32_t w2, uint32_t w3) {
  return _mm512_shuffle_epi8(as<__m512i>(x), _mm512_set4_epi32(static_cast<int>(w3), static_cast<int>(w2),
                                                               static_cast<int>(w1), static_cast<int>(w0)));
}

// Words of the even elements' high halves, and of the odd ones' high halves.
SIGNADAM_HD U high_halves(U even, U odd) {
  const __m512i order = _mm512_set4_epi32(0x0f0e0f0e, 0x0b0a0b0a, 0x07060706, 0x03020302);
  return as<U>(_mm512_mask_shuffle_epi8(as<__m512i>(odd), 0x3333333333333333, as<__m512i>(even), order));
}

SIGNADAM_HD U exclusive_or(U a, U b, U c) {
  return as<U>(_mm512_ternarylogic_epi32(as<__m512i>(a), as<__m512i>(b), as<__m512i>(c), 0x96));
}

SIGNADAM_HD bool any_nan(V a, V b) { return _mm512_cmp_ps_mask(as<__m512>(a), as<__m512>(b), _CMP_UNORD_Q) != 0; }

// Before its low half is cut off, for the nearest or even: one more where the high half is odd.
SIGNADAM_HD U rounded_to_even(U bits) {
  const __m512i x = as<__m512i>(bits);
  const __m512i down = _mm512_add_epi32(x, _mm512_set1_epi32(0x7fff));
  const __mmask16 odd = _mm512_test_epi32_mask(x, _mm512_set1_epi32(0x10000));
  return as<U>(_mm512_mask_add_epi32(down, odd, x, _mm512_set1_epi32(0x8000)));
}

// 16-bit words, and bytes, each in a lane.
SIGNADAM_HD U words_of(const void* from) { return widen_halves(load_half(from)); }
SIGNADAM_HD U bytes_of(const void* from) {
  return as<U>(_mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(from))));
}

// Byte i / 2 of 8, at the top of lane i.
SIGNADAM_HD U nibbles_of(const void* from) {
  int64_t bytes;
  std::memcpy(&bytes, from, sizeof bytes);
  const __m512i order =
      _mm512_setr_epi64(0x00ffffff00ffffff, 0x01ffffff01ffffff, 0x02ffffff02ffffff, 0x03ffffff03ffffff,
                        0x04ffffff04ffffff, 0x05ffffff05ffffff, 0x06ffffff06ffffff, 0x07ffffff07ffffff);
  return as<U>(_mm512_shuffle_epi8(_mm512_set1_epi64(bytes), order));
}

// The bytes in bits 16 to 23 of the lanes of a group.
SIGNADAM_HD Bytes third_bytes(const I* even, const I* odd) {
  const auto pair = [&](int k) {
    const __m512i order = _mm512_set4_epi32(0x0e000000, 0x0a000000, 0x06000000, 0x02000000);
    return _mm512_mask_shuffle_epi8(as<__m512i>(even[k]), 0x8888888888888888, as<__m512i>(odd[k]), order);
  };
  return halved(as<U>(pair(0)), as<U>(pair(1))).high;
}

#else

SIGNADAM_HD __m256i shuffled(U x, uint32_t w0, uint32_t w1, uint32_t w2, uint32_t w3) {
  const __m128i order =
      _mm_setr_epi32(static_cast<int>(w0), static_cast<int>(w1), static_cast<int>(w2), static_cast<int>(w3));
  return _mm256_shuffle_epi8(as<__m256i>(x), _mm256_broadcastsi128_si256(order));
}

SIGNADAM_HD U high_halves(U even, U odd) {
  return as<U>(_mm256_blend_epi16(_mm256_srli_epi32(as<__m256i>(even), 16), as<__m256i>(odd), 0xaa));
}

SIGNADAM_HD U exclusive_or(U a, U b, U c) { return a ^ b ^ c; }

SIGNADAM_HD bool any_nan(V a, V b) {
  return _mm256_movemask_ps(_mm256_cmp_ps(as<__m256>(a), as<__m256>(b), _CMP_UNORD_Q)) != 0;
}

SIGNADAM_HD U rounded_to_even(U bits) { return bits + ((bits >> 16 & 1u) + 0x7fffu); }

SIGNADAM_HD U words_of(const void* from) { return widen_halves(load_half(from)); }
SIGNADAM_HD U bytes_of(const void* from) {
  return as<U>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(from))));
}

SIGNADAM_HD U nibbles_of(const void* from) {
  const __m256i order =
      _mm256_setr_epi64x(0x00ffffff00ffffff, 0x01ffffff01ffffff, 0x02ffffff02ffffff, 0x03ffffff03ffffff);
  return as<U>(_mm256_shuffle_epi8(_mm256_set1_epi32(word_at(static_cast<const unsigned char*>(from))), order));
}

SIGNADAM_HD Bytes third_bytes(const I* even, const I* odd) {
  // Packing works within 128-bit lanes.
  const auto pair = [&](int k) {
    const __m256i high = _mm256_slli_epi32(as<__m256i>(odd[k]), 8), low = as<__m256i>(even[k]);
    return _mm256_srli_epi32(_mm256_blendv_epi8(low, high, _mm256_set1_epi32(static_cast<int>(0xff000000u))), 16);
  };
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(pair(0), pair(1)), 0xd8);
}

#endif

// The 16 random bits of even and of odd elements for the first moment: their bytes are swapped.
SIGNADAM_HD I even_bits_for_m(U r) { return as<I>(shuffled(r, 0xffff0001u, 0xffff0405u, 0xffff0809u, 0xffff0c0du)); }
SIGNADAM_HD I odd_bits_for_m(U r) { return as<I>(shuffled(r, 0xffff0203u, 0xffff0607u, 0xffff0a0bu, 0xffff0e0fu)); }

// A constant that stays in its register where there are 32: there compilers make constants anew in every turn of a
// loop.
SIGNADAM_HD U kept(uint32_t value) {
  U x = U{} + value;
#if defined(__AVX512BW__)
  asm("" : "+v"(x));
#endif
  return x;
}

// Words of random bits, `width` after `width`.
struct PairBits {
  U pair, k0, k1, first = kept(0x7feb352du), second = kept(0x846ca68bu), step = kept(width);

  SIGNADAM_HD PairBits(const RngSubkey& keys, uint32_t begin) : k0(U{} + keys.k0), k1(U{} + keys.k1) {
    for (int i = 0; i < width; ++i) pair[i] = static_cast<uint32_t>(i);
    pair += begin;
  }

  SIGNADAM_HD U next() {
    U x = pair ^ k0;
    pair += step;
    x ^= x >> 16;
    x *= first;
    x = exclusive_or(x, x >> 15, k1);
    x *= second;
    return x ^ (x >> 16);
  }
};

// `low`: words of 0xffff.
SIGNADAM_HD Pairs load_pairs(const void* base, int64_t index, U low) {
  const U words = as<U>(*reinterpret_cast<const Loose*>(static_cast<const uint16_t*>(base) + index));
  return {as<V>(words << 16), as<V>(words & ~low)};
}

// What becomes of NaN: rare, so kept out of the way.
SIGNADAM_HD U without_nan(U words, Pairs x) {
  const U nan = (as<U>(x.even != x.even) & 0xffffu) | (as<U>(x.odd != x.odd) & 0xffff0000u);
  return (words & ~nan) | (nan & 0x7fc07fc0u);
}

SIGNADAM_HD void store_pairs(void* base, int64_t index, Pairs x, U r, U low, bool stochastic) {
  const U even = as<U>(x.even), odd = as<U>(x.odd);
  U words = stochastic ? high_halves(even + (r & low), odd + (r >> 16))
                       : high_halves(rounded_to_even(even), rounded_to_even(odd));
  if (__builtin_expect(any_nan(x.even, x.odd), 0)) words = without_nan(words, x);
  *reinterpret_cast<Loose*>(static_cast<uint16_t*>(base) + index) = as<V>(words);
}

// Codes at the top of their lanes, and nothing below.
template <Format format>
SIGNADAM_HD void load_codes(const unsigned char* from, U& even, U& odd) {
  if constexpr (format == Format::int8) {
    const U words = words_of(from);
    even = words << 24;
    odd = words << 16 & 0xff000000u;
  } else if constexpr (format == Format::int4) {
    const U bytes = bytes_of(from);
    even = bytes << 28;
    odd = bytes << 24 & 0xf0000000u;
  } else {
    // Of a byte, the even lane has the low nibble.
    U low;
    for (int i = 0; i < width; ++i) low[i] = i % 2 == 0 ? 4 : 0;
    const U nibbles = nibbles_of(from) << low;
    even = nibbles << 2 & 0xc0000000u;
    odd = nibbles & 0xc0000000u;
  }
}

// A group, which comes as 2^16 times itself, rounded to codes of a byte.
SIGNADAM_HD Bytes rounded_codes(const Pairs* x, const U* r) {
  I even[2], odd[2];
  for (int k = 0; k < 2; ++k) {
    even[k] = __builtin_convertvector(x[k].even, I) + even_bits_for_m(r[k]);
    odd[k] = __builtin_convertvector(x[k].odd, I) + odd_bits_for_m(r[k]);
  }
  return third_bytes(even, odd);
}

template <Format format>
SIGNADAM_HD void store_codes(unsigned char* to, const Pairs* x, const U* r) {
  const Bytes bytes = rounded_codes(x, r);
  if constexpr (format == Format::int8)
    store_bytes(to, bytes);
  else if constexpr (format == Format::int4)
    pack_int4(to, bytes);
  else
    pack_int2(to, bytes);
}

// From here on the largest of a block may need an exponent above 120.
constexpr uint32_t saturating = 0x7e800000u;

#if defined(__AVX512BW__)

// x * 2^e, rounded once.
SIGNADAM_HD V times_power(V x, V e) { return as<V>(_mm512_scalef_ps(as<__m512>(x), as<__m512>(e))); }

SIGNADAM_HD bool any_nan_code(const void* codes) {
  return _mm512_cmpeq_epi8_mask(_mm512_loadu_si512(codes), _mm512_set1_epi8(nan_code)) != 0;
}

// A group of block-scaled codes.
SIGNADAM_HD void load_blocks(const unsigned char* codes, const int8_t* exponents, Pairs* x) {
  for (int k = 0; k < 2; ++k) {
    U even, odd;
    load_codes<Format::int8>(codes + k * packed_run, even, odd);
    const V e = V{} + static_cast<float>(exponents[k] - 24);
    x[k] = {times_power(__builtin_convertvector(as<I>(even), V), e),
            times_power(__builtin_convertvector(as<I>(odd), V), e)};
  }
}

// False where something is not finite, or so large that codes saturate: nothing is stored then.
SIGNADAM_HD bool store_blocks(unsigned char* codes, int8_t* exponents, const Pairs* x, const U* r) {
  __m512i largest[2];
  for (int k = 0; k < 2; ++k)
    largest[k] =
        _mm512_max_epu32(as<__m512i>(as<U>(x[k].even) & 0x7fffffffu), as<__m512i>(as<U>(x[k].odd) & 0x7fffffffu));
  // The maximum of the first block in all lanes of the lower half, that of the second in those of the upper.
  __m512i most = _mm512_max_epu32(_mm512_shuffle_i32x4(largest[0], largest[1], 0x44),
                                  _mm512_shuffle_i32x4(largest[0], largest[1], 0xee));
  most = _mm512_max_epu32(most, _mm512_shuffle_i32x4(most, most, 0xb1));
  most = _mm512_max_epu32(most, _mm512_shuffle_epi32(most, _MM_PERM_BADC));
  most = _mm512_max_epu32(most, _mm512_shuffle_epi32(most, _MM_PERM_CDAB));
  if (__builtin_expect(_mm512_cmpge_epu32_mask(most, _mm512_set1_epi32(saturating)) != 0, 0)) return false;
  // As block_exponent has it, and 133 more.
  const __m512i sum = _mm512_srli_epi32(_mm512_add_epi32(most, _mm512_set1_epi32(0x1ffff)), 23);
  const __m512i e = _mm512_max_epi32(sum, _mm512_set1_epi32(133 - 126));
  exponents[0] = static_cast<int8_t>(_mm_cvtsi128_si32(_mm512_castsi512_si128(e)) - 133);
  exponents[1] = static_cast<int8_t>(_mm_cvtsi128_si32(_mm512_extracti32x4_epi32(e, 2)) - 133);
  const __m512 up = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_set1_epi32(133 + 16), e));
  const V first = as<V>(_mm512_shuffle_f32x4(up, up, 0)), second = as<V>(_mm512_shuffle_f32x4(up, up, 0xaa));
  const Pairs scaled[2] = {{times_power(x[0].even, first), times_power(x[0].odd, first)},
                           {times_power(x[1].even, second), times_power(x[1].odd, second)}};
  store_bytes(codes, rounded_codes(scaled, r));
  return true;
}

#else

SIGNADAM_HD bool any_nan_code(const void* codes) {
  const __m256i bytes = _mm256_loadu_si256(static_cast<const __m256i*>(codes));
  return _mm256_movemask_epi8(_mm256_cmpeq_epi8(bytes, _mm256_set1_epi8(nan_code))) != 0;
}

SIGNADAM_HD void load_blocks(const unsigned char* codes, const int8_t* exponents, Pairs* x) {
  const float scale = power_of_two(exponents[0]);
  for (int k = 0; k < 2; ++k) {
    U even, odd;
    load_codes<Format::int8>(codes + 2 * k * width, even, odd);
    x[k] = {__builtin_convertvector(as<I>(even) >> 24, V) * scale,
            __builtin_convertvector(as<I>(odd) >> 24, V) * scale};
  }
}

SIGNADAM_HD bool store_blocks(unsigned char* codes, int8_t* exponents, const Pairs* x, const U* r) {
  __m256i largest = _mm256_setzero_si256();
  for (int k = 0; k < 2; ++k) {
    largest = _mm256_max_epu32(largest, as<__m256i>(as<U>(x[k].even) & 0x7fffffffu));
    largest = _mm256_max_epu32(largest, as<__m256i>(as<U>(x[k].odd) & 0x7fffffffu));
  }
  __m128i most = _mm_max_epu32(_mm256_castsi256_si128(largest), _mm256_extracti128_si256(largest, 1));
  most = _mm_max_epu32(most, _mm_shuffle_epi32(most, 0x4e));
  most = _mm_max_epu32(most, _mm_shuffle_epi32(most, 0xb1));
  const auto bits = static_cast<uint32_t>(_mm_cvtsi128_si32(most));
  if (__builtin_expect(bits >= saturating, 0)) return false;
  const int e = block_exponent(bits);
  exponents[0] = static_cast<int8_t>(e);
  // One after the other: their product could be too large for a float.
  const float inverse = power_of_two(-e);
  Pairs scaled[2];
  for (int k = 0; k < 2; ++k) scaled[k] = {x[k].even * inverse * 65536.0f, x[k].odd * inverse * 65536.0f};
  store_bytes(codes, rounded_codes(scaled, r));
  return true;
}

#endif

// The rare ways: codes that stand for NaN, and blocks that store_blocks does not take.
SIGNADAM_HD void load_nan_codes(const unsigned char* codes, Pairs* x) {
  for (int k = 0; k < 2; ++k) {
    U even, odd;
    load_codes<Format::int8>(codes + 2 * k * width, even, odd);
    x[k].even = as<I>(even) == INT32_MIN ? V{} + float_of(0x7fc00000u) : x[k].even;
    x[k].odd = as<I>(odd) == INT32_MIN ? V{} + float_of(0x7fc00000u) : x[k].odd;
  }
}

SIGNADAM_APART void store_blocks_slowly(void* base, int64_t numel, int64_t index, const Pairs* x, const U* r) {
  float m[group];
  uint16_t halves[group];
  std::memcpy(halves, r, sizeof halves);
  for (int k = 0; k < 2; ++k)
    for (int i = 0; i < width; ++i) {
      m[2 * (k * width + i)] = x[k].even[i];
      m[2 * (k * width + i) + 1] = x[k].odd[i];
    }
  store_moment<0>(base, Format::block8, numel, index, m, halves, group);
}

// Of codes, a moment comes as the top of a 32-bit integer, and is kept as 2^16 times itself, the form in which it is
// rounded. Scalars that match do both: powers of two change no bit as long as nothing is subnormal.

SIGNADAM_HD bool scales_exactly(const Scalars& s) {
  const auto exact = [](float x) { return x == 0.0f || x > 0x1p-80f; };
  return exact(s.lr) && exact(s.beta1) && exact(s.one_minus_beta1);
}

// The whole groups of a chunk, of which `s` says whether they are `as_it_is`. Returns how many elements that were.
template <class Rule, Format moment, bool as_it_is>
SIGNADAM_APART int update_pairs(const Slice& slice, const Scalars& scalars, float alpha) {
  Scalars s = scalars;  // a local copy cannot alias the tensors
  if constexpr (is_scale_free(moment)) {
    if (!scales_exactly(s)) return 0;
    constexpr float fixed_point = 65536.0f, top = static_cast<float>(uint64_t{1} << (32 - bits_of(moment)));
    s.lr /= fixed_point;
    s.beta1 *= fixed_point / top;
    s.one_minus_beta1 *= fixed_point;
    s.upper *= fixed_point;  // what a bounded momentum may not leave
  }
  if constexpr (as_it_is) leave_as_it_is(s);
  const TensorEntry tensor = slice.tensor;
  const void* const grad = slice.grad;
  const bool stochastic = tensor.formats.param_storage == ParamStorage::stochastic;
  const bool draws = Rule::moments > 0 || stochastic;
  const auto first = static_cast<uint64_t>(tensor.shard_offset + slice.begin);
  const RngSubkey keys = RngSubkey::of(slice.rng_keys, static_cast<uint32_t>(first >> 33));
  PairBits bits(keys, static_cast<uint32_t>(first >> 1));
  const U low = kept(0xffffu);
  const int64_t begin = slice.begin;
  const int whole = slice.count / group * group;
  for (int done = 0; done < whole; done += group) {
    const int64_t index = begin + done;
    auto* const codes = static_cast<unsigned char*>(tensor.exp_avg) + bytes_before(moment, index);
    Pairs p[2], g[2], m[2], v[2];
    V none{};
    U r[2] = {};
    if constexpr (moment == Format::block8) {
      load_blocks(codes, exponent_at(tensor.exp_avg, tensor.numel, index), m);
      if (__builtin_expect(any_nan_code(codes), 0)) load_nan_codes(codes, m);
    }
    for (int k = 0; k < 2; ++k) {
      g[k] = load_pairs(grad, index + 2 * k * width, low);
      p[k] = load_pairs(tensor.param, index + 2 * k * width, low);
      if constexpr (moment == Format::bf16) {
        m[k] = load_pairs(tensor.exp_avg, index + 2 * k * width, low);
      } else if constexpr (is_scale_free(moment)) {
        U even, odd;
        load_codes<moment>(codes + bytes_before(moment, 2 * k * width), even, odd);
        m[k] = {__builtin_convertvector(as<I>(even), V), __builtin_convertvector(as<I>(odd), V)};
      }
      if constexpr (Rule::moments > 1) v[k] = load_pairs(tensor.exp_avg_sq, index + 2 * k * width, low);
      apply<Rule>(s, alpha, p[k].even, g[k].even, m[k].even, v[k].even, none);
      apply<Rule>(s, alpha, p[k].odd, g[k].odd, m[k].odd, v[k].odd, none);
      if (draws) r[k] = bits.next();
      store_pairs(tensor.param, index + 2 * k * width, p[k], r[k], low, stochastic);
      if constexpr (moment == Format::bf16)
        store_pairs(tensor.exp_avg, index + 2 * k * width, m[k], swap_bytes(r[k]), low, true);
      if constexpr (Rule::moments > 1)
        store_pairs(tensor.exp_avg_sq, index + 2 * k * width, v[k], ~swap_bytes(r[k]), low, true);
    }
    if constexpr (is_scale_free(moment)) store_codes<moment>(codes, m, r);
    if constexpr (moment == Format::block8)
      if (!store_blocks(codes, exponent_at(tensor.exp_avg, tensor.numel, index), m, r)) {
        const Pairs copied_m[2] = {m[0], m[1]};  // so that the others need no address
        const U copied_r[2] = {r[0], r[1]};
        store_blocks_slowly(tensor.exp_avg, tensor.numel, index, copied_m, copied_r);
      }
  }
  return whole;
}

// Whether this goes by pairs at all, and which moments do.
template <class Rule>
int update_pairs(const Slice& slice, const Scalars& s, float alpha) {
  const Formats& f = slice.tensor.formats;
  if (f.param != Format::bf16 || f.grad != Format::bf16 || (Rule::moments > 1 && f.exp_avg_sq != Format::bf16) ||
      !goes_by_groups(slice, 0) || !takes(s, alpha))
    return 0;
#define SIGNADAM_PAIRS(moment)                                                      \
  return is_as_it_is(s) ? update_pairs<Rule, Format::moment, true>(slice, s, alpha) \
                        : update_pairs<Rule, Format::moment, false>(slice, s, alpha)
  if constexpr (Rule::moments == 0) {
    SIGNADAM_PAIRS(fp32);
  } else {
    if (f.exp_avg == Format::bf16) SIGNADAM_PAIRS(bf16);
    if constexpr (Rule::bounded) {
      if (f.exp_avg == Format::int8) SIGNADAM_PAIRS(int8);
      if (f.exp_avg == Format::int4) SIGNADAM_PAIRS(int4);
      if (f.exp_avg == Format::int2) SIGNADAM_PAIRS(int2);
    }
    if constexpr (has_blocks<Rule>)
      if (f.exp_avg == Format::block8) SIGNADAM_PAIRS(block8);
    return 0;
  }
#undef SIGNADAM_PAIRS
}
