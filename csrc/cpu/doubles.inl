// Included by kernels.inl, inside its namespace: sums of doubles over fp32 and bf16 gradients, for thresholds and
// statistics. Orders of additions are those of the loops in kernels.inl, which take what this does not.

typedef double D __attribute__((vector_size(4 * width)));

#if defined(__AVX512BW__)
SIGNADAM_HD D low_doubles(V x) { return as<D>(_mm512_cvtps_pd(_mm512_castps512_ps256(as<__m512>(x)))); }
SIGNADAM_HD D high_doubles(V x) { return as<D>(_mm512_cvtps_pd(_mm512_extractf32x8_ps(as<__m512>(x), 1))); }

// Which elements of a vector: those |g| > alpha, of an alpha that is not negative.
using Which = __mmask16;
SIGNADAM_HD Which passes(V g, float alpha) {
  return _mm512_cmp_ps_mask(as<__m512>(as<U>(g) & 0x7fffffffu), as<__m512>(V{} + alpha), _CMP_GT_OQ);
}
SIGNADAM_HD void add_count(V& to, Which which) {
  to = as<V>(_mm512_mask_add_ps(as<__m512>(to), which, as<__m512>(to), _mm512_set1_ps(1.0f)));
}
// Of x, which holds the low or the high lanes.
SIGNADAM_HD void add_low(D& to, Which which, D x) {
  const auto sum = as<__m512d>(to);
  to = as<D>(_mm512_mask_add_pd(sum, static_cast<__mmask8>(which), sum, as<__m512d>(x)));
}
SIGNADAM_HD void add_high(D& to, Which which, D x) { add_low(to, static_cast<Which>(which >> 8), x); }
SIGNADAM_HD Which opposite(V a, V b) {
  const __m512 zero = _mm512_setzero_ps(), x = as<__m512>(a), y = as<__m512>(b);
  const Which up = _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(x, zero, _CMP_LT_OQ), y, zero, _CMP_GT_OQ);
  const Which down = _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(x, zero, _CMP_GT_OQ), y, zero, _CMP_LT_OQ);
  return static_cast<Which>(up | down);
}
#else
SIGNADAM_HD D low_doubles(V x) { return as<D>(_mm256_cvtps_pd(_mm256_castps256_ps128(as<__m256>(x)))); }
SIGNADAM_HD D high_doubles(V x) { return as<D>(_mm256_cvtps_pd(_mm256_extractf128_ps(as<__m256>(x), 1))); }

using Which = I;
SIGNADAM_HD Which passes(V g, float alpha) { return as<V>(as<U>(g) & 0x7fffffffu) > alpha; }
SIGNADAM_HD void add_count(V& to, Which which) { to += which ? V{} + 1.0f : V{}; }
SIGNADAM_HD void add_low(D& to, Which which, D x) {
  to += as<D>(_mm256_and_si256(_mm256_cvtepi32_epi64(low_half(as<U>(which))), as<__m256i>(x)));
}
SIGNADAM_HD void add_high(D& to, Which which, D x) {
  to += as<D>(_mm256_and_si256(_mm256_cvtepi32_epi64(high_half(as<U>(which))), as<__m256i>(x)));
}
SIGNADAM_HD Which opposite(V a, V b) { return ((a < 0.0f) & (b > 0.0f)) | ((a > 0.0f) & (b < 0.0f)); }
#endif

// Lanes of a chunk whose sums stay in registers over all rows: as many as leave some registers free.
constexpr int column = width == 16 ? 64 : 16;

template <bool steers, Format format>
void sum_columns(const Slice& slice, const Scalars& s, float alpha, double* first, double* second) {
  const float scale = s.gradient_scale;
  const void* const grad = slice.grad;
  const int64_t begin = slice.begin;
  constexpr int vectors = column / width, ahead = 256 / size_of(format);
  for (int at = 0; at < lane_count; at += column) {
    D a[2 * vectors] = {}, b[2 * vectors] = {};
    V passed[vectors] = {};  // at most one a row
    for (int row = 0; row < row_count; ++row) {
      const int64_t index = begin + row * lane_count + at;
      // Rows are too short for the processor to see so many streams coming.
      for (int64_t byte = 0; byte < bytes_before(format, column); byte += 64)
        __builtin_prefetch(static_cast<const char*>(grad) + bytes_before(format, index + ahead) + byte);
      for (int k = 0; k < vectors; ++k) {
        const V g = load_vector(grad, format, index + k * width) * scale;
        const D low = low_doubles(g), high = high_doubles(g);
        if constexpr (steers) {
          add_count(passed[k], passes(g, alpha));
        } else {
          a[2 * k] += low;
          a[2 * k + 1] += high;
        }
        b[2 * k] += low * low;
        b[2 * k + 1] += high * high;
      }
    }
    for (int k = 0; k < vectors && steers; ++k) {
      a[2 * k] = low_doubles(passed[k]);
      a[2 * k + 1] = high_doubles(passed[k]);
    }
    std::memcpy(first + at, a, sizeof a);
    std::memcpy(second + at, b, sizeof b);
  }
}

// The lanes of a full chunk, where the gradient counts without decay. False where this does not apply.
SIGNADAM_APART bool sum_lanes(const Slice& slice, const Scalars& s, float alpha, double* first, double* second) {
  if (slice.count < chunk_size || s.coupled || !(alpha >= 0.0f)) return false;
  switch (slice.tensor.formats.grad) {
    case Format::fp32:
      s.steers ? sum_columns<true, Format::fp32>(slice, s, alpha, first, second)
               : sum_columns<false, Format::fp32>(slice, s, alpha, first, second);
      return true;
    case Format::bf16:
      s.steers ? sum_columns<true, Format::bf16>(slice, s, alpha, first, second)
               : sum_columns<false, Format::bf16>(slice, s, alpha, first, second);
      return true;
    default:
      return false;
  }
}

// The sums of the rows of a block, in registers.
class ObservedRows {
 public:
  // Vector k of a row. Without a momentum only the gradient is seen.
  SIGNADAM_HD void add_gradient(int k, V g, float alpha) {
    const Which seen = passes(g, alpha);
    const D low = low_doubles(g), high = high_doubles(g), low_square = low * low, high_square = high * high;
    add_count(passed_[k], seen);
    squares_[2 * k] += low_square;
    squares_[2 * k + 1] += high_square;
    add_low(passed_squares_[2 * k], seen, low_square);
    add_high(passed_squares_[2 * k + 1], seen, high_square);
  }
  SIGNADAM_HD void add_momentum(int k, V before, V after) {
    add_count(flips_[k], opposite(before, after));
    const V size = as<V>(as<U>(after) & 0x7fffffffu);
    magnitudes_[2 * k] += low_doubles(size);
    magnitudes_[2 * k + 1] += high_doubles(size);
  }
  SIGNADAM_HD void store(ObservedLanes& to) const {
    std::memcpy(to.squares, squares_, sizeof squares_);
    std::memcpy(to.passed_squares, passed_squares_, sizeof passed_squares_);
    std::memcpy(to.magnitudes, magnitudes_, sizeof magnitudes_);
    for (int k = 0; k < vectors; ++k)
      for (int lane = 0; lane < width; ++lane) {
        to.passed[k * width + lane] = passed_[k][lane];
        to.flips[k * width + lane] = flips_[k][lane];
      }
  }
  static constexpr int vectors = observed_lanes / width;

 private:
  D squares_[2 * vectors] = {}, passed_squares_[2 * vectors] = {}, magnitudes_[2 * vectors] = {};
  V passed_[vectors] = {}, flips_[vectors] = {};  // at most one a row
};

// Of observe_block, the elements of whole rows of 16. Returns how many that were.
int observe_rows(const float* g, float alpha, const float* before, const float* after, int count, ObservedLanes& to) {
  ObservedRows rows;
  int i = 0;
  for (; i + observed_lanes <= count; i += observed_lanes)
    for (int k = 0; k < ObservedRows::vectors; ++k) {
      rows.add_gradient(k, load_vector(g, Format::fp32, i + k * width), alpha);
      if (after == nullptr) continue;
      rows.add_momentum(k, load_vector(before, Format::fp32, i + k * width),
                        load_vector(after, Format::fp32, i + k * width));
    }
  rows.store(to);
  return i;
}

// The whole blocks of a chunk in fp32, updated and observed in one pass: the sums are taken while memory is waited for.
// Returns how many elements that were.
template <class Rule>
SIGNADAM_APART int update_observed(const Slice& slice, const Scalars& scalars, float alpha, ChunkStatistics& to) {
  static_assert(Rule::moments < 2 && !has_third<Rule>);
  const Formats& formats = slice.tensor.formats;
  if (!formats.plain() || formats.param != Format::fp32 || formats.grad != Format::fp32 || !takes(scalars, alpha))
    return 0;
  const Scalars s = scalars;  // a local copy cannot alias the tensors
  const auto array = [&](void* base) { return static_cast<float*>(base) + slice.begin; };
  float* const param = array(slice.tensor.param);
  float* const exp_avg = Rule::moments > 0 ? array(slice.tensor.exp_avg) : nullptr;
  const float* const grad = static_cast<const float*>(slice.grad) + slice.begin;
  const int whole = slice.count / block_size * block_size;
  for (int done = 0; done < whole; done += block_size) {
    ObservedRows rows;
    for (int i = done; i < done + block_size; i += observed_lanes)
      for (int k = 0; k < ObservedRows::vectors; ++k) {
        const int at = i + k * width;
        V p = load_vector(param, Format::fp32, at), m{}, none{};
        if constexpr (Rule::moments > 0) m = load_vector(exp_avg, Format::fp32, at);
        const V before = m, g = effective_gradient(s, p, load_vector(grad, Format::fp32, at));
        apply_effective<Rule>(s, alpha, p, g, m, none, none);
        rows.add_gradient(k, g, alpha);
        *reinterpret_cast<Loose*>(param + at) = p;
        if constexpr (Rule::moments > 0) {
          rows.add_momentum(k, before, m);
          *reinterpret_cast<Loose*>(exp_avg + at) = m;
        }
      }
    ObservedLanes lanes;
    rows.store(lanes);
    add_lanes(lanes, to);
  }
  return whole;
}
