// The chunks of a vote on the CPU; included by kernels.inl.

// Null where there is no momentum or no residual.
template <VoteMemory memory, bool residual>
void cast_block(const VoteScalars& scalars, const VoteOptions& options, const float* SIGNADAM_RESTRICT g,
                float* SIGNADAM_RESTRICT m, float* SIGNADAM_RESTRICT r, int32_t* SIGNADAM_RESTRICT codes, int count) {
  const VoteScalars s = scalars;
  const bool maximize = options.maximize;
  const int32_t spoiled = options.spoiled;
  for (int i = 0; i < count; ++i) {
    float m_i = 0.0f, r_i = 0.0f;
    if constexpr (memory != VoteMemory::none) m_i = m[i];
    if constexpr (residual) r_i = r[i];
    codes[i] = cast_vote<memory, residual>(s, maximize, spoiled, g[i], m_i, r_i);
    if constexpr (memory != VoteMemory::none) m[i] = m_i;
    if constexpr (residual) r[i] = r_i;
  }
}

// `to`: the words of the chunk.
template <VoteMemory memory, bool residual>
void cast_chunk(const VoteEntry& entry, const VoteScalars& scalars, const VoteOptions& options, int64_t begin,
                int64_t count, Format format, uint32_t* to) {
  const VoteScalars s = scalars;
  constexpr bool has_momentum = memory != VoteMemory::none;
  alignas(64) float scratch[block_size];
  alignas(64) int32_t codes[block_size];
  const auto kept = [&](int64_t base, int64_t index, bool used) {
    return used ? reinterpret_cast<float*>(base) + index : nullptr;
  };
  for (int64_t done = 0; done < count; done += block_size) {
    const int64_t index = begin + done;
    const int n = static_cast<int>(count - done < block_size ? count - done : block_size);
    const float* const g = widened(reinterpret_cast<const void*>(entry.values), format, index, scratch, n);
    float* const m = kept(entry.momentum, index, has_momentum);
    float* const r = kept(entry.residual, index, residual);
    cast_block<memory, residual>(s, options, g, m, r, codes, n);
    const int words = (n + codes_per_word - 1) / codes_per_word;
    for (int i = n; i < words * codes_per_word; ++i) codes[i] = 0;
    for (int word = 0; word < words; ++word) {
      uint32_t bits = 0;
      for (int i = 0; i < codes_per_word; ++i) bits |= code_bits(codes[word * codes_per_word + i], 2, i);
      to[done / codes_per_word + word] = bits;
    }
  }
}

// `codes`: the first worker's, those of the next are `stride` words on. The result has `bits` bits an entry.
template <int bits, bool majority>
void count_words(const uint32_t* codes, int64_t workers, int64_t stride, int64_t words, uint32_t* to) {
  // Words of a few lanes at a time: each of 16 sums is a vector over words.
  constexpr int lanes = 16, in_word = 32 / bits, parts = codes_per_word / in_word;
  for (int64_t first = 0; first < words; first += lanes) {
    const int n = static_cast<int>(words - first < lanes ? words - first : lanes);
    alignas(64) int32_t sums[codes_per_word][lanes] = {};
    alignas(64) uint32_t spoiled[lanes] = {}, own[lanes] = {};
    for (int64_t worker = 0; worker < workers; ++worker) {
      const uint32_t* const from = codes + worker * stride + first;
      for (int lane = 0; lane < n; ++lane) own[lane] = from[lane];
      for (int lane = 0; lane < lanes; ++lane) spoiled[lane] |= spoiled_in(own[lane]);
      for (int i = 0; i < codes_per_word; ++i)
        for (int lane = 0; lane < lanes; ++lane) sums[i][lane] += code_at(own[lane], 2, i);
    }
    alignas(64) uint32_t packed[parts][lanes] = {};
    for (int i = 0; i < codes_per_word; ++i)
      for (int lane = 0; lane < lanes; ++lane) {
        const int32_t sum = majority ? majority_of(sums[i][lane]) : sums[i][lane];
        const int32_t code = (spoiled[lane] >> (2 * i + 1) & 1u) != 0 ? spoiled_code(bits) : sum;
        packed[i / in_word][lane] |= code_bits(code, bits, i % in_word);
      }
    for (int lane = 0; lane < n; ++lane)
      for (int part = 0; part < parts; ++part) to[(first + lane) * parts + part] = packed[part][lane];
  }
}

// `from`: the words of the chunk, of `bits` bits an entry.
template <int bits>
void read_chunk(const VoteEntry& entry, const VoteScalars& scalars, const RngKey& key, int64_t begin, int64_t count,
                Format format, VoteUse use, float divisor, const uint32_t* from) {
  const VoteScalars s = scalars;
  alignas(64) float votes[block_size], scratch[block_size];
  constexpr int in_word = 32 / bits;
  for (int64_t done = 0; done < count; done += block_size) {
    const int64_t index = begin + done;
    const int n = static_cast<int>(count - done < block_size ? count - done : block_size);
    const uint32_t* SIGNADAM_RESTRICT const words = from + done / in_word;
    int i = 0;
    for (; i + in_word <= n; i += in_word)
      for (int place = 0; place < in_word; ++place)
        votes[i + place] = vote_value(code_at(words[i / in_word], bits, place), bits, divisor);
    for (; i < n; ++i) votes[i] = vote_value(code_at(words[i / in_word], bits, i % in_word), bits, divisor);
    void* const values = const_cast<void*>(at(reinterpret_cast<const void*>(entry.values), format, index));
    float* SIGNADAM_RESTRICT const p = format == Format::fp32 ? static_cast<float*>(values) : scratch;
    if (use == VoteUse::write) {
      std::memcpy(p, votes, sizeof(float) * static_cast<std::size_t>(n));
    } else {
      if (format != Format::fp32) widen_block(format, static_cast<const uint16_t*>(values), p, n);
      for (int k = 0; k < n; ++k) p[k] = stepped(s, p[k], votes[k]);
    }
    if (format == Format::fp32) continue;
    auto* const narrowed = static_cast<uint16_t*>(values);
    if (use != VoteUse::step_stochastic) {
      narrow_block(format, p, narrowed, n);
      continue;
    }
    Halves halves;
    const uint16_t* SIGNADAM_RESTRICT const r = draw(key, index, n, halves);
    for (int k = 0; k < n; ++k) narrowed[k] = narrow(format, p[k], r[k]);
  }
}
