// Counted by bench/instructions.py: one form of SignAdamPP over a full chunk, or its random bits alone, so many times.
#define SIGNADAM_ISA avx2
#define SIGNADAM_ISA_NAME "avx2"
#define SIGNADAM_ISA_TABLE avx2_kernels
#include "../csrc/cpu/kernels.inl"

#include <cstdlib>
#include <vector>

using namespace signadam;
using namespace signadam::cpu::avx2;

int main(int, char** arguments) {
  const bool draws_only = std::atoi(arguments[1]) != 0;
  const auto moment = static_cast<Format>(std::atoi(arguments[2]));
  const auto param_storage = static_cast<ParamStorage>(std::atoi(arguments[3]));
  const int times = std::atoi(arguments[4]);
  std::vector<uint16_t> param(chunk_size, 0x3f80), grad(chunk_size);
  for (int i = 0; i < chunk_size; ++i) grad[i] = i % 3 == 0 ? 0xbf80 : 0x3f80;
  std::vector<float> exp_avg(chunk_size), residual(chunk_size);
  Slice slice{};
  slice.tensor.param = param.data();
  slice.tensor.residual = residual.data();
  slice.tensor.exp_avg = exp_avg.data();
  slice.tensor.numel = chunk_size;
  slice.tensor.formats = {Format::bf16, Format::bf16, moment, Format::fp32, Format::fp32, param_storage};
  slice.grad = grad.data();
  slice.count = chunk_size;
  Scalars s{};
  s.gradient_scale = 1.0f, s.lr = 1e-3f, s.decay = 1.0f, s.beta1 = 0.9f, s.one_minus_beta1 = 0.1f;
  uint32_t sum = 0;
  for (int t = 0; t < times; ++t) {
    slice.rng_keys = RngKey::of(0, 0, static_cast<uint64_t>(t) + 1);
    if (draws_only) {
      U seen{};
      PairBits bits(RngSubkey::of(slice.rng_keys, 0), 0);
      for (int i = 0; i < chunk_size; i += 2 * width) seen ^= bits.next();
      sum ^= seen[0];
    } else {
      update_chunk<SignAdamPP>(slice, s, 0.0f, nullptr);
    }
  }
  return sum == 1 ? 1 : 0;
}
