// The host side of csrc/cuda/step.cu over a runtime that is not there, as a library for ctypes.
#include "../../csrc/core/rules.h"
#if defined(SIGNADAM_QUICK)  // whichever kernel is launched, the host does the same
#undef SIGNADAM_RULES
#define SIGNADAM_RULES(X) X(SignSGD) X(SignAdamPP)
#endif
#include "../../csrc/cuda/step.cu"

using namespace signadam;
using namespace signadam::cuda;

std::size_t fake_parameter_bytes() { return sizeof(LaunchArguments); }

namespace {

// What went wrong, or nothing.
template <class Do>
int report(char* message, std::size_t room, Do action) {
  try {
    action();
    return 0;
  } catch (const std::exception& error) {
    std::strncpy(message, error.what(), room - 1);
    return 1;
  }
}

}  // namespace

extern "C" {

// `contexts`: a bit for each device that has one; `context`: the device of the current one, or -1.
void begin(int contexts, int context, int stale_error, int launch_result) {
  fake = {};
  for (int i = 0; i < 8; ++i) fake.context_of[i] = contexts >> i & 1;
  fake.context = context;
  fake.last_error = static_cast<cudaError_t>(stale_error);
  fake.launch_result = static_cast<cudaError_t>(launch_result);
}

int contexts() {
  int found = 0;
  for (int i = 0; i < 8; ++i) found |= fake.context_of[i] << i;
  return found;
}
int context() { return fake.context; }
int selections() { return fake.selections; }
int launches() { return fake.launches; }
int launched_on() { return fake.launched_on; }
int last_error() { return fake.last_error; }
int64_t capacity() { return static_cast<int64_t>(inline_capacity()); }

// `size` bytes of step data, inline where `device_step` is null.
int launch_step(const unsigned char* step, int64_t size, void* device_step, int device, char* message, int64_t room) {
  StepLayout layout{};
  layout.size = static_cast<std::size_t>(size);
  return report(message, static_cast<std::size_t>(room), [&] {
    launch(rule_SignSGD, ThresholdPass::none, Storage::plain, TableView{}, 3, layout, step, device_step, device,
           nullptr);
  });
}

// What the kernel got: its header's address of the step data, and the bytes beside it.
void* launched_step() {
  LaunchHeader header;
  std::memcpy(&header, fake.parameters.data(), sizeof header);
  return const_cast<unsigned char*>(header.step);
}
const unsigned char* launched_bytes() { return fake.parameters.data() + offsetof(LaunchArguments, step); }

int read_kernel_info(int device, char* message, int64_t room) {
  return report(message, static_cast<std::size_t>(room), [&] { kernel_info(device); });
}

int is_usable(int device) { return unusable_reason(device).empty(); }
}
