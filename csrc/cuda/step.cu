#include "step.h"

#include <cstring>

#include "any_rule.h"
#include "device_step.h"
#include "fixed.h"
#include "runtime.h"

namespace signadam::cuda {
namespace {

template <class Rule, Storage storage>
Kernel update_kernel() {
  if constexpr (storage == Storage::plain && has_third<Rule>)
    return {};
  else
    return Kernel::of<Rule, ThresholdPass::none, storage, AnyForms>();
}

// Only a gated rule gathers statistics; the first launch of the exact form is the same for all of them.
template <Storage storage>
Kernel kernel_of(RuleIndex rule, ThresholdPass threshold_pass) {
  if (threshold_pass == ThresholdPass::pass_before)
    return Kernel::of<SignAdamPP, ThresholdPass::pass_before, storage == Storage::plain ? Storage::plain : Storage::any,
                      AnyForms>();
  if (threshold_pass == ThresholdPass::same_pass)
    return rule == rule_SignAdamPP ? Kernel::of<SignAdamPP, ThresholdPass::same_pass, storage, AnyForms>() : Kernel{};
  switch (rule) {
#define SIGNADAM_CASE(Rule) \
  case rule_##Rule:         \
    return update_kernel<Rule, storage>();
    SIGNADAM_RULES(SIGNADAM_CASE)
#undef SIGNADAM_CASE
    default:
      return {};
  }
}

// The general kernel.
Kernel kernel_of(RuleIndex rule, ThresholdPass threshold_pass, Storage storage) {
  switch (storage) {
    case Storage::plain:
      return kernel_of<Storage::plain>(rule, threshold_pass);
    case Storage::any:
      return kernel_of<Storage::any>(rule, threshold_pass);
    default:
      return kernel_of<Storage::with_statistics>(rule, threshold_pass);
  }
}

template <class Use>
void each_fixed(Use use) {
  for (const auto* unit : {&fixed_plain(), &fixed_stored(), &fixed_two_moments(), &fixed_thresholds(), &fixed_scaled()})
    for (const FixedKernel& fixed : *unit) use(fixed);
}

// The kernel for just these forms where there is one, otherwise the general one.
Kernel kernel_of(const KernelChoice& choice) {
  Kernel found = choice.scaling == Scaling::none ? kernel_of(choice.rule, choice.threshold_pass, choice.storage)
                                                 : kernel_for_any_rule(choice.threshold_pass, choice.storage);
  if (choice.formats == nullptr) return found;
  const bool before = choice.threshold_pass == ThresholdPass::pass_before;
  const Formats formats = before ? read_before(*choice.formats) : *choice.formats;
  each_fixed([&](const FixedKernel& fixed) {
    if (fixed.threshold_pass != choice.threshold_pass || fixed.scaling != choice.scaling) return;
    if (!(fixed.formats == formats)) return;
    if (before || (fixed.rule == choice.rule && fixed.storage == choice.storage)) found = fixed.kernel;
  });
  return found;
}

}  // namespace

StepLayout StepLayout::of(std::size_t scalar_sets, std::size_t tensors, std::size_t drawing) {
  StepLayout layout{};
  layout.grads = scalar_sets * sizeof(Scalars);
  layout.rng_keys = layout.grads + tensors * sizeof(void*);
  layout.scalar_indices = layout.rng_keys + drawing * sizeof(RngKey);
  layout.size = layout.scalar_indices + tensors * sizeof(uint32_t);
  return layout;
}
static_assert(sizeof(Scalars) % alignof(void*) == 0);

std::size_t inline_capacity(const KernelChoice& choice) { return kernel_of(choice).inline_bytes; }

void launch(const KernelChoice& choice, const TableView& table, uint32_t chunks, const StepLayout& layout,
            const void* inline_step, const void* device_step, int device, void* stream) {
  const Kernel kernel = kernel_of(choice);
  if (kernel.function == nullptr) throw std::runtime_error("no CUDA kernel for this rule with a threshold of its own");
  // Parameters of every kernel begin alike: one that takes fewer gets the first of these.
  LaunchArguments<many_parameter_bytes> arguments;
  const auto offset = [](std::size_t bytes) { return static_cast<uint32_t>(bytes); };
  arguments.header = {table,
                      static_cast<const unsigned char*>(device_step),
                      offset(layout.grads),
                      layout.rng_keys == layout.scalar_indices ? 0 : offset(layout.rng_keys),
                      offset(layout.scalar_indices),
                      static_cast<uint32_t>(choice.rule)};
  // The kernel for any rule takes sums wherever it finds a place for them. Here a launch before has taken them, or the
  // ranks that have parts.
  if (choice.threshold_pass == ThresholdPass::none) arguments.header.table.sums = nullptr;
  if (device_step == nullptr) {
    if (layout.size > kernel.inline_bytes)
      throw std::runtime_error("the step data does not fit the kernel's parameters");
    std::memcpy(arguments.step, inline_step, layout.size);
  }
  start(kernel.function, chunks, &arguments, device, stream, "to launch the update");
}

std::string unusable_reason(int device) {
  int driver = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) {
    cudaGetLastError();
    return "no NVIDIA driver is loaded";
  }
  const auto version = [](int v) { return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10); };
  // Within a major version an older driver serves a newer runtime.
  if (driver / 1000 < CUDART_VERSION / 1000)
    return "the driver supports CUDA " + version(driver) + ", the module was built with CUDA " +
           version(CUDART_VERSION);
  int count = 0;
  if (const auto status = cudaGetDeviceCount(&count); status != cudaSuccess) {
    cudaGetLastError();
    return cudaGetErrorString(status);
  }
  if (device >= count) return "there is no device " + std::to_string(device);
  try {
    const DeviceGuard guard(device);
    cudaFuncAttributes attributes{};
    const auto status =
        cudaFuncGetAttributes(&attributes, kernel_of(rule_SignSGD, ThresholdPass::none, Storage::plain).function);
    if (status == cudaSuccess) return "";
    cudaGetLastError();
    int major = 0, minor = 0;
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "to read the device's capability");
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "to read the device's capability");
    return "the module has no code for sm_" + std::to_string(10 * major + minor) + " (" + cudaGetErrorString(status) +
           ")";
  } catch (const std::runtime_error& error) {
    return error.what();
  }
}

int runtime_version() { return CUDART_VERSION; }

std::vector<KernelInfo> kernel_info(int device) {
  const DeviceGuard guard(device);
  std::vector<KernelInfo> infos;
  const auto add_function = [&infos](std::string name, const void* function, int threads) {
    if (function == nullptr) return;
    cudaFuncAttributes a{};
    check(cudaFuncGetAttributes(&a, function), "to read kernel attributes");
    int blocks = 0;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, function, threads, 0), "to read occupancy");
    infos.push_back({std::move(name), a.numRegs, static_cast<int>(a.sharedSizeBytes),
                     static_cast<int>(a.localSizeBytes), threads, blocks});
  };
  const auto add = [&](std::string name, const Kernel& kernel) {
    add_function(std::move(name), kernel.function, threads_per_block);
  };
  for (const Storage storage : {Storage::plain, Storage::any, Storage::with_statistics}) {
    const std::string suffix = storage == Storage::plain ? ""
                               : storage == Storage::any ? "+stored"
                                                         : "+step_statistics";
#define SIGNADAM_ADD(Rule) add(Rule::name + suffix, kernel_of(rule_##Rule, ThresholdPass::none, storage));
    SIGNADAM_RULES(SIGNADAM_ADD)
#undef SIGNADAM_ADD
    add("sign_adam_pp+same_pass" + suffix, kernel_of(rule_SignAdamPP, ThresholdPass::same_pass, storage));
    if (storage != Storage::with_statistics)
      add("pass_before" + suffix, kernel_of(rule_SignAdamPP, ThresholdPass::pass_before, storage));
  }
  for (const Storage storage : {Storage::any, Storage::with_statistics})
    add(storage == Storage::any ? "scaled" : "scaled+step_statistics",
        kernel_for_any_rule(ThresholdPass::same_pass, storage));
  add("scaled+pass_before", kernel_for_any_rule(ThresholdPass::pass_before, Storage::any));
  each_fixed([&](const FixedKernel& fixed) { add(fixed.name, fixed.kernel); });
  for (const DeviceStepKernel& kernel : device_step_kernels())
    add_function(kernel.name, kernel.function, kernel.threads);
  return infos;
}

}  // namespace signadam::cuda
