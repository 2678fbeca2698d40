// Included by kernels.inl, inside its namespace: 16-bit tensors and few-bit moments without a stop in memory. A group
// of four vectors goes from storage through the rule and back in registers; forms are chosen by branches that the whole
// chunk takes alike. What is rarer goes by way of stored.inl.

#if defined(__AVX512BW__)
constexpr int width = 16;
#else
constexpr int width = 8;
#endif
constexpr int group = 4 * width;
static_assert(group % packed_run == 0 || packed_run % group == 0);

typedef float V __attribute__((vector_size(4 * width)));
typedef float Loose __attribute__((vector_size(4 * width), aligned(4), may_alias));  // a V anywhere in memory
typedef int32_t I __attribute__((vector_size(4 * width)));
typedef uint32_t U __attribute__((vector_size(4 * width)));

template <class To, class From>
SIGNADAM_HD To as(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &x, sizeof to);
  return to;
}

// The few operations that compilers do not find by themselves, on a group: x[k] holds elements [k * width, ...).
#if defined(__AVX512BW__)

using Bytes = __m512i;  // one for each element of a group
using Half = __m256i;

SIGNADAM_HD Half load_half(const void* from) { return _mm256_loadu_si256(static_cast<const Half*>(from)); }
SIGNADAM_HD void store_bytes(void* to, Bytes x) { _mm512_storeu_si512(to, x); }
SIGNADAM_HD U widen_halves(Half x) { return as<U>(_mm512_cvtepu16_epi32(x)); }
SIGNADAM_HD I widen_bytes(const void* from) {
  return as<I>(_mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(from))));
}

// Two vectors of words as one of their high and one of their low halves.
struct Halved {
  __m512i high, low;
};

SIGNADAM_HD Halved halved(U a, U b) {
  alignas(64) static constexpr uint16_t even[32] = {0,  2,  4,  6,  8,  10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
                                                    32, 34, 36, 38, 40, 42, 44, 46, 48, 50, 52, 54, 56, 58, 60, 62};
  const __m512i low = _mm512_load_si512(even), high = _mm512_or_si512(low, _mm512_set1_epi16(1));
  return {_mm512_permutex2var_epi16(as<__m512i>(a), high, as<__m512i>(b)),
          _mm512_permutex2var_epi16(as<__m512i>(a), low, as<__m512i>(b))};
}

// (word + r) >> 16 of two vectors of words, in 16-bit lanes: the high half, and one more where the low half carries.
SIGNADAM_HD __m512i rounded_up(Halved x, U r) {
  const __mmask32 carry = _mm512_cmplt_epu16_mask(_mm512_add_epi16(x.low, as<__m512i>(r)), x.low);
  return _mm512_mask_add_epi16(x.high, carry, x.high, _mm512_set1_epi16(1));
}

// A group as bf16, by 16 random bits for each element or to nearest even.
SIGNADAM_HD void store_bf16(void* base, int64_t index, const V* x, const U* r, bool stochastic) {
  uint16_t* to = static_cast<uint16_t*>(base) + index;
  for (int k = 0; k < 4; k += 2) {
    const Halved bits = halved(as<U>(x[k]), as<U>(x[k + 1]));
    const __m512i odd = _mm512_and_si512(bits.high, _mm512_set1_epi16(1));
    const U nearest = as<U>(_mm512_add_epi16(odd, _mm512_set1_epi16(0x7fff)));
    const __m512 a = as<__m512>(x[k]), b = as<__m512>(x[k + 1]);
    const __mmask32 nan =
        _mm512_kunpackw(_mm512_cmp_ps_mask(b, b, _CMP_UNORD_Q), _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q));
    const __m512i narrow = rounded_up(bits, stochastic ? r[k / 2] : nearest);
    store_bytes(to + k * width, _mm512_mask_mov_epi16(narrow, nan, _mm512_set1_epi16(0x7fc0)));
  }
}

// (x + r) >> 16 of a group of integers, whose results fit bytes.
SIGNADAM_HD Bytes codes_of(const I* x, const U* r) {
  const __m512i low = rounded_up(halved(as<U>(x[0]), as<U>(x[1])), r[0]);
  const __m512i high = rounded_up(halved(as<U>(x[2]), as<U>(x[3])), r[1]);
  return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi16_epi8(low)), _mm512_cvtepi16_epi8(high), 1);
}

SIGNADAM_HD void pack_int4(void* to, Bytes codes) {
  const __m512i pairs =
      _mm512_maddubs_epi16(_mm512_and_si512(codes, _mm512_set1_epi8(0x0f)), _mm512_set1_epi16(0x1001));
  _mm256_storeu_si256(static_cast<Half*>(to), _mm512_cvtepi16_epi8(pairs));
}

SIGNADAM_HD void pack_int2(void* to, Bytes codes) {
  const __m512i pairs = _mm512_maddubs_epi16(_mm512_and_si512(codes, _mm512_set1_epi8(3)), _mm512_set1_epi16(0x0401));
  const __m512i fours = _mm512_madd_epi16(pairs, _mm512_set1_epi32(0x00100001));
  _mm_storeu_si128(static_cast<__m128i*>(to), _mm512_cvtepi32_epi8(fours));
}

SIGNADAM_HD U swap_bytes(U x) {
  const __m512i order = _mm512_set4_epi32(0x0e0f0c0d, 0x0a0b0809, 0x06070405, 0x02030001);
  return as<U>(_mm512_shuffle_epi8(as<__m512i>(x), order));
}

#else

using Bytes = __m256i;
using Half = __m128i;

SIGNADAM_HD Half load_half(const void* from) { return _mm_loadu_si128(static_cast<const Half*>(from)); }
SIGNADAM_HD void store_bytes(void* to, Bytes x) { _mm256_storeu_si256(static_cast<Bytes*>(to), x); }
SIGNADAM_HD U widen_halves(Half x) { return as<U>(_mm256_cvtepu16_epi32(x)); }
SIGNADAM_HD I widen_bytes(const void* from) {
  return as<I>(_mm256_cvtepi8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(from))));
}
SIGNADAM_HD Half low_half(U x) { return _mm256_castsi256_si128(as<__m256i>(x)); }
SIGNADAM_HD Half high_half(U x) { return _mm256_extracti128_si256(as<__m256i>(x), 1); }

// The 16 random bits of vector k, one in each lane; a vector of them serves two of words.
SIGNADAM_HD U lanes(const U* r, int k) { return widen_halves(k % 2 == 0 ? low_half(r[k / 2]) : high_half(r[k / 2])); }

// A group as bf16, by 16 random bits for each element or to nearest even.
SIGNADAM_HD void store_bf16(void* base, int64_t index, const V* x, const U* r, bool stochastic) {
  uint16_t* to = static_cast<uint16_t*>(base) + index;
  U narrow[4];
  for (int k = 0; k < 4; ++k) {
    const U bits = as<U>(x[k]);
    const U rounded = (bits + (stochastic ? lanes(r, k) : 0x7fffu + ((bits >> 16) & 1u))) >> 16;
    narrow[k] = as<U>(x[k] != x[k] ? I{} + 0x7fc0 : as<I>(rounded));
  }
  for (int k = 0; k < 4; k += 2) {
    // Packing works within 128-bit lanes.
    const __m256i packed = _mm256_packus_epi32(as<__m256i>(narrow[k]), as<__m256i>(narrow[k + 1]));
    store_bytes(to + k * width, _mm256_permute4x64_epi64(packed, 0xd8));
  }
}

// (x + r) >> 16 of a group of integers, whose results fit bytes.
SIGNADAM_HD Bytes codes_of(const I* x, const U* r) {
  I q[4];
  for (int k = 0; k < 4; ++k) q[k] = (x[k] + as<I>(lanes(r, k))) >> 16;
  const __m256i low = _mm256_packs_epi32(as<__m256i>(q[0]), as<__m256i>(q[1]));
  const __m256i high = _mm256_packs_epi32(as<__m256i>(q[2]), as<__m256i>(q[3]));
  return _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

SIGNADAM_HD void pack_int4(void* to, Bytes codes) {
  const __m256i pairs =
      _mm256_maddubs_epi16(_mm256_and_si256(codes, _mm256_set1_epi8(0x0f)), _mm256_set1_epi16(0x1001));
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi16(pairs, pairs), 0xd8);
  _mm_storeu_si128(static_cast<Half*>(to), _mm256_castsi256_si128(packed));
}

SIGNADAM_HD void pack_int2(void* to, Bytes codes) {
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_and_si256(codes, _mm256_set1_epi8(3)), _mm256_set1_epi16(0x0401));
  const __m256i fours = _mm256_madd_epi16(pairs, _mm256_set1_epi32(0x00100001));
  // The low byte of each word, of both 128-bit lanes.
  const __m256i order = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0, 4, 8, 12, -1,
                                         -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
  const __m256i bytes = _mm256_shuffle_epi8(fours, order);
  const __m128i both = _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
  _mm_storel_epi64(static_cast<__m128i*>(to), both);
}

SIGNADAM_HD U swap_bytes(U x) {
  const __m128i order = _mm_setr_epi8(1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
  return as<U>(_mm256_shuffle_epi8(as<__m256i>(x), _mm256_broadcastsi128_si256(order)));
}

#endif

}  // namespace
}  // namespace signadam::cpu::SIGNADAM_ISA

namespace signadam {

// The size with the gradient's sign, or 0: no product, and one comparison.
template <>
struct GatedStep<cpu::SIGNADAM_ISA::V> {
  using V = cpu::SIGNADAM_ISA::V;
  using U = cpu::SIGNADAM_ISA::U;
  static SIGNADAM_HD V of(float size, V g, float alpha) {
    const U bits = cpu::SIGNADAM_ISA::as<U>(g), sizes = cpu::SIGNADAM_ISA::as<U>(V{} + size);
    const V magnitude = cpu::SIGNADAM_ISA::as<V>(bits & 0x7fffffffu);
#if defined(__AVX512BW__)
    const __mmask16 passes = _mm512_cmp_ps_mask(magnitude, V{} + alpha, _CMP_GT_OQ);
    return cpu::SIGNADAM_ISA::as<V>(_mm512_maskz_ternarylogic_epi32(
        passes, reinterpret_cast<__m512i>(bits), _mm512_set1_epi32(INT32_MAX), reinterpret_cast<__m512i>(sizes), 0x9a));
#else
    return cpu::SIGNADAM_ISA::as<V>(cpu::SIGNADAM_ISA::as<U>(magnitude > alpha) & ((bits & ~0x7fffffffu) ^ sizes));
#endif
  }
};

}  // namespace signadam

namespace signadam::cpu::SIGNADAM_ISA {
namespace {

// The random halves of a group: two vectors of words, each the 16 bits of 2 * width elements in order.
struct GroupBits {
  U word[2];

  SIGNADAM_HD static GroupBits of(const RngSubkey& keys, uint32_t pair) {
    U lane;
    for (int i = 0; i < width; ++i) lane[i] = static_cast<uint32_t>(i);
    return {{draw(keys, lane + pair), draw(keys, lane + (pair + width))}};
  }

  SIGNADAM_HD static U draw(const RngSubkey& keys, U x) {
    x ^= keys.k0;
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x = (x ^ keys.k1) * 0x846ca68bu;
    return x ^ (x >> 16);
  }

  // Those for m, and for v.
  SIGNADAM_HD GroupBits swapped() const { return {{swap_bytes(word[0]), swap_bytes(word[1])}}; }
  SIGNADAM_HD GroupBits complement() const { return {{~word[0], ~word[1]}}; }
};

SIGNADAM_HD V load_vector(const void* base, Format format, int64_t index) {
  if (format == Format::fp32) return *reinterpret_cast<const Loose*>(static_cast<const float*>(base) + index);
  return as<V>(widen_halves(load_half(static_cast<const uint16_t*>(base) + index)) << 16);
}

SIGNADAM_HD void load_group(const void* base, Format format, int64_t index, V* x) {
  if (format == Format::fp32)
    for (int k = 0; k < 4; ++k) x[k] = load_vector(base, Format::fp32, index + k * width);
  else
    for (int k = 0; k < 4; ++k) x[k] = load_vector(base, Format::bf16, index + k * width);
}

SIGNADAM_HD void store_fp32(void* base, int64_t index, const V* x) {
  float* to = static_cast<float*>(base) + index;
  for (int k = 0; k < 4; ++k) *reinterpret_cast<Loose*>(to + k * width) = x[k];
}

// Codes of `bits` bits that lie side by side in the words of x: each is moved to the top of its lane, and brought down
// with its sign. `offset`: where in the word the first lane's code begins.
template <int bits>
SIGNADAM_HD I codes_in(I x, int offset) {
  constexpr int per_word = 32 / bits;
  I left;
  for (int i = 0; i < width; ++i) left[i] = 32 - bits - offset - bits * (i % per_word);
  return (x << left) >> (32 - bits);
}

SIGNADAM_HD int32_t word_at(const unsigned char* from) {
  int32_t word;
  std::memcpy(&word, from, sizeof word);
  return word;
}

SIGNADAM_HD void load_moment_group(const void* base, Format format, int64_t index, V* m) {
  if (!is_packed(format)) return load_group(base, format, index, m);
  const auto* from = static_cast<const unsigned char*>(base) + bytes_before(format, index);
  I q[4];
  if (format == Format::int8) {
    for (int k = 0; k < 4; ++k) q[k] = widen_bytes(from + k * width);
  } else if (format == Format::int4) {
    for (int k = 0; k < 4; ++k) {
      I words{};
      for (int i = 0; i < width; ++i) words[i] = word_at(from + k * width / 2 + i / 8 * 4);
      q[k] = codes_in<4>(words, 0);
    }
  } else {
    for (int k = 0; k < 4; ++k) q[k] = codes_in<2>(I{} + word_at(from + k * width / 16 * 4), k * width % 16 * 2);
  }
  for (int k = 0; k < 4; ++k) m[k] = __builtin_convertvector(q[k], V);
}

SIGNADAM_HD void store_moment_group(void* base, Format format, int64_t index, const V* m, const GroupBits& r) {
  if (format == Format::fp32) return store_fp32(base, index, m);
  if (format == Format::bf16) return store_bf16(base, index, m, r.word, true);
  auto* to = static_cast<unsigned char*>(base) + bytes_before(format, index);
  I fixed[4];
  for (int k = 0; k < 4; ++k) fixed[k] = __builtin_convertvector(m[k] * 65536.0f, I);
  const Bytes bytes = codes_of(fixed, r.word);
  if (format == Format::int8)
    store_bytes(to, bytes);
  else if (format == Format::int4)
    pack_int4(to, bytes);
  else
    pack_int2(to, bytes);
}

// Whether the gradient counts as it is, neither scaled nor with decay added, and decay is not cautious.
SIGNADAM_HD bool is_as_it_is(const Scalars& s) { return !s.coupled && !s.cautious_decay && s.gradient_scale == 1.0f; }

// What is so is known to the compiler afterwards.
SIGNADAM_HD void leave_as_it_is(Scalars& s) {
  s.coupled = s.cautious_decay = 0;
  s.gradient_scale = 1.0f;
}

// Whether GatedStep takes these: every lr, beta and threshold that an optimizer lets through.
SIGNADAM_HD bool takes(const Scalars& s, float alpha) {
  constexpr float largest = 0x1p+100f;
  return s.lr >= 0.0f && s.lr < largest && s.one_minus_beta1 >= 0.0f && s.one_minus_beta1 < largest && alpha >= 0.0f;
}

// Whether every operand has a form that goes by groups, and one pair of keys serves the chunk, which is one run.
SIGNADAM_HD bool goes_by_groups(const Slice& slice, int moments) {
  const auto wide = [](Format format) { return format == Format::fp32 || format == Format::bf16; };
  const Formats& f = slice.tensor.formats;
  const int64_t first = slice.tensor.shard_offset + slice.begin;
  return wide(f.param) && wide(f.grad) && (moments < 1 || wide(f.exp_avg) || is_scale_free(f.exp_avg)) &&
         (moments < 2 || wide(f.exp_avg_sq)) &&
         (f.param_storage == ParamStorage::nearest || f.param_storage == ParamStorage::stochastic) && first % 2 == 0 &&
         first >> 33 == (first + slice.count) >> 33 && slice.tensor.runs.run == 0;
}

// The whole groups of a chunk, of which `s` says whether they are `as_it_is`. Returns how many elements that were.
template <class Rule, bool as_it_is>
SIGNADAM_APART int update_groups(const Slice& slice, const Scalars& scalars, float alpha) {
  // Local copies cannot alias the tensors, so they stay in registers.
  Scalars s = scalars;
  if constexpr (as_it_is) leave_as_it_is(s);
  const TensorEntry tensor = slice.tensor;
  const Formats f = tensor.formats;
  const void* const grad = slice.grad;
  const bool draws = !f.plain(), stochastic = f.param_storage == ParamStorage::stochastic;
  const auto first = static_cast<uint64_t>(tensor.shard_offset + slice.begin);
  const RngSubkey keys = RngSubkey::of(slice.rng_keys, static_cast<uint32_t>(first >> 33));
  const int64_t begin = slice.begin;
  const int whole = slice.count / group * group;
  for (int done = 0; done < whole; done += group) {
    const int64_t index = begin + done;
    V p[4], g[4], m[4], v[4], none{};
    load_group(grad, f.grad, index, g);
    load_group(tensor.param, f.param, index, p);
    if constexpr (Rule::moments > 0) load_moment_group(tensor.exp_avg, f.exp_avg, index, m);
    if constexpr (Rule::moments > 1) load_group(tensor.exp_avg_sq, f.exp_avg_sq, index, v);
    for (int k = 0; k < 4; ++k) apply<Rule>(s, alpha, p[k], g[k], m[k], v[k], none);
    GroupBits r{};
    if (draws) r = GroupBits::of(keys, static_cast<uint32_t>((first + static_cast<uint64_t>(done)) >> 1));
    if (f.param == Format::fp32)
      store_fp32(tensor.param, index, p);
    else
      store_bf16(tensor.param, index, p, r.word, stochastic);
    if constexpr (Rule::moments > 0) store_moment_group(tensor.exp_avg, f.exp_avg, index, m, r.swapped());
    if constexpr (Rule::moments > 1)
      store_moment_group(tensor.exp_avg_sq, f.exp_avg_sq, index, v, r.swapped().complement());
  }
  return whole;
}

template <class Rule>
int update_groups(const Slice& slice, const Scalars& s, float alpha) {
  static_assert(!has_third<Rule>);
  if (!goes_by_groups(slice, Rule::moments) || !takes(s, alpha)) return 0;
  return is_as_it_is(s) ? update_groups<Rule, true>(slice, s, alpha) : update_groups<Rule, false>(slice, s, alpha);
}
