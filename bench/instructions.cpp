// Counted by bench/instructions.py, so many times: SignAdamPP over a full chunk of bf16 in one form, its random bits
// alone, or over a chunk of fp32, observed or not.
#define SIGNADAM_ISA avx2
#define SIGNADAM_ISA_NAME "avx2"
#define SIGNADAM_ISA_TABLE avx2_kernels
#include "../csrc/cpu/kernels.inl"

#include <cstdlib>
#include <vector>

using namespace signadam;
using namespace signadam::cpu::avx2;

int main(int, char** arguments) {
  enum { bf16_step, draws_only, fp32_step, fp32_observed };
  const int counted = std::atoi(arguments[1]);
  const auto moment = static_cast<Format>(std::atoi(arguments[2]));
  const auto param_storage = static_cast<ParamStorage>(std::atoi(arguments[3]));
  const int times = std::atoi(arguments[4]);
  std::vector<uint16_t> param(chunk_size, 0x3f80), grad(chunk_size);
  for (int i = 0; i < chunk_size; ++i) grad[i] = i % 3 == 0 ? 0xbf80 : 0x3f80;
  std::vector<float> exp_avg(chunk_size), residual(chunk_size), wide_param(chunk_size, 1.0f), wide_grad(chunk_size);
  for (int i = 0; i < chunk_size; ++i) wide_grad[i] = i % 3 == 0 ? -1.0f : 1.0f;
  Slice slice{};
  slice.tensor.param = param.data();
  slice.tensor.residual = residual.data();
  slice.tensor.exp_avg = exp_avg.data();
  slice.tensor.numel = chunk_size;
  slice.tensor.formats = {Format::bf16, Format::bf16, moment, Format::fp32, Format::fp32, param_storage};
  slice.grad = grad.data();
  if (counted == fp32_step || counted == fp32_observed) {
    slice.tensor.param = wide_param.data();
    slice.tensor.formats.param = slice.tensor.formats.grad = Format::fp32;
    slice.grad = wide_grad.data();
  }
  slice.count = chunk_size;
  Scalars s{};
  s.gradient_scale = 1.0f, s.lr = 1e-3f, s.decay = 1.0f, s.beta1 = 0.9f, s.one_minus_beta1 = 0.1f;
  uint32_t sum = 0;
  for (int t = 0; t < times; ++t) {
    slice.rng_keys = RngKey::of(0, 0, static_cast<uint64_t>(t) + 1);
    if (counted == draws_only) {
      U seen{};
      PairBits bits(RngSubkey::of(slice.rng_keys, 0), 0);
      for (int i = 0; i < chunk_size; i += 2 * width) seen ^= bits.next();
      sum ^= seen[0];
    } else {
      ChunkStatistics statistics;
      update_chunk<SignAdamPP>(slice, s, 0.0f, counted == fp32_observed ? &statistics : nullptr);
    }
  }
  return sum == 1 ? 1 : 0;
}
