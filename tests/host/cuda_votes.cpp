// The kernels of csrc/cuda/vote.cu without a GPU, as a library for ctypes: each launch as the backend makes it on a
// runtime that is not there, then its kernel thread by thread.
#include "../../csrc/cuda/vote.cu"

#include "host_block.h"

using namespace signadam;
using namespace signadam::host;

namespace {

std::size_t parameter_size;

}  // namespace

std::size_t fake_parameter_bytes(const void*) { return parameter_size; }

namespace {

// Makes a launch whose kernel takes `Arguments`, and runs it, blocks and threads in this order. Returns the number of
// blocks, or -1 where it is not one launch.
template <class Arguments, class Launch>
int64_t run(int order, uint32_t seed, Launch launch) {
  fake = {};
  parameter_size = sizeof(Arguments);
  launch();
  if (fake.launches.empty()) return 0;
  const FakeLaunch& made = fake.launches[0];
  if (fake.launches.size() != 1 || made.dynamic_shared != 0) return -1;
  Arguments arguments;
  std::memcpy(static_cast<void*>(&arguments), made.parameters.data(), sizeof arguments);
  auto* const kernel = reinterpret_cast<void (*)(Arguments)>(const_cast<void*>(made.function));
  std::mt19937 random(seed);
  for (const uint32_t block : ordered(made.blocks, static_cast<Order>(order), random))
    for (const uint32_t thread : ordered(made.threads, static_cast<Order>(order), random)) {
      blockIdx.x = block, threadIdx.x = thread;
      kernel(arguments);
    }
  return made.blocks;
}

}  // namespace

extern "C" {

int64_t host_cast_votes(const VoteTable* table, int memory, int residual, int maximize, int32_t spoiled, int format,
                        uint32_t* codes, int order, uint32_t seed) {
  const VoteOptions options{static_cast<VoteMemory>(memory), residual != 0, maximize != 0, spoiled};
  return run<cuda::CastArguments>(
      order, seed, [&] { cuda::cast_votes(*table, options, static_cast<Format>(format), codes, 0, nullptr); });
}

int64_t host_count_votes(const uint32_t* codes, int64_t workers, int64_t words, int bits, int majority,
                         uint32_t* result, int order, uint32_t seed) {
  return run<cuda::CountArguments>(
      order, seed, [&] { cuda::count_votes(codes, workers, words, bits, majority != 0, result, 0, nullptr); });
}

int64_t host_read_votes(const VoteTable* table, const RngKey* keys, int use, int format, int bits, float divisor,
                        const uint32_t* result, int order, uint32_t seed) {
  return run<cuda::ReadArguments>(order, seed, [&] {
    cuda::read_votes(*table, keys, static_cast<VoteUse>(use), static_cast<Format>(format), bits, divisor, result, 0,
                     nullptr);
  });
}
}
