// The host side of csrc/cuda over a runtime that is not there, as a library for ctypes.
#include "../../csrc/core/rules.h"
#include "../../csrc/cuda/instances.h"
#if defined(SIGNADAM_QUICK)  // whichever kernel is launched, the host does the same
#undef SIGNADAM_RULES
#define SIGNADAM_RULES(X) X(SignSGD) X(SignAdamPP)
#undef SIGNADAM_FIXED_PLAIN
#define SIGNADAM_FIXED_PLAIN(X) X(SignSGD, none, plain, fp32, fp32, fp32, nearest)
#undef SIGNADAM_FIXED_STORED
#define SIGNADAM_FIXED_STORED(X) X(SignAdamPP, none, any, bf16, int8, fp32, stochastic)
#undef SIGNADAM_FIXED_TWO_MOMENTS
#define SIGNADAM_FIXED_TWO_MOMENTS(X)
#undef SIGNADAM_FIXED_THRESHOLDS
#define SIGNADAM_FIXED_THRESHOLDS(X)
#undef SIGNADAM_FIXED_SCALED
#define SIGNADAM_FIXED_SCALED(X)
#endif
#include "../../csrc/cuda/any_rule.cu"
#include "../../csrc/cuda/device_step.cu"
#include "../../csrc/cuda/fixed_plain.cu"
#include "../../csrc/cuda/fixed_scaled.cu"
#include "../../csrc/cuda/fixed_stored.cu"
#include "../../csrc/cuda/fixed_thresholds.cu"
#include "../../csrc/cuda/fixed_two_moments.cu"
#include "../../csrc/cuda/step.cu"

using namespace signadam;
using namespace signadam::cuda;

namespace {

constexpr std::size_t step_begins = offsetof(LaunchArguments<many_parameter_bytes>, step);

// A kernel by its function.
struct Known {
  RuleIndex rule;
  ThresholdPass threshold_pass;
  Storage storage;
  const Formats* formats;
  std::size_t parameter_bytes;
  bool is_scaled;  // only kernels for fixed forms are
};

bool find(const void* function, Known& known) {
  bool found = false;
  each_fixed([&](const FixedKernel& fixed) {
    if (fixed.kernel.function != function) return;
    found = true;
    known = {fixed.rule,
             fixed.threshold_pass,
             fixed.storage,
             &fixed.formats,
             step_begins + fixed.kernel.inline_bytes,
             fixed.scaling != Scaling::none};
  });
  // The gated rule before the others, which share its first pass.
  std::vector<int> rules{rule_SignAdamPP};
  for (int rule = 0; rule < rule_count; ++rule) rules.push_back(rule);
  for (const auto which : {ThresholdPass::none, ThresholdPass::same_pass, ThresholdPass::pass_before})
    for (const auto storage : {Storage::plain, Storage::any, Storage::with_statistics})
      for (const int rule : rules) {
        const Kernel kernel = kernel_of(static_cast<RuleIndex>(rule), which, storage);
        if (found || kernel.function != function) continue;
        found = true;
        known = {static_cast<RuleIndex>(rule), which, storage, nullptr, step_begins + kernel.inline_bytes, false};
      }
  // A kernel for any rule is known as that of none.
  for (const auto which : {ThresholdPass::same_pass, ThresholdPass::pass_before})
    for (const auto storage : {Storage::any, Storage::with_statistics}) {
      const Kernel kernel = kernel_for_any_rule(which, storage);
      if (found || kernel.function != function) continue;
      found = true;
      known = {rule_count, which, storage, nullptr, step_begins + kernel.inline_bytes, false};
    }
  return found;
}

KernelChoice small_step() { return {rule_SignSGD, ThresholdPass::none, Storage::plain, nullptr}; }

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

// Of what the CUDA backend sends to the device.
const TensorEntry* entries_of(const unsigned char* table, int64_t tensors, int64_t chunks, int64_t table_size) {
  if (table_size != tensors * static_cast<int64_t>(sizeof(TensorEntry)) + chunks * 4)
    throw std::runtime_error("the table was not built from these headers");
  return reinterpret_cast<const TensorEntry*>(table);
}

bool is_plain(const TensorEntry* entries, int64_t tensors) {
  return std::all_of(entries, entries + tensors, [](const TensorEntry& entry) { return entry.plain(); });
}

}  // namespace

std::size_t fake_parameter_bytes(const void* function) {
  if (function == reinterpret_cast<const void*>(norm_kernel)) return sizeof(NormArguments);
  if (function == reinterpret_cast<const void*>(begin_kernel)) return sizeof(BeginArguments);
  Known known{};
  return find(function, known) ? known.parameter_bytes : 0;
}

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
int launches() { return static_cast<int>(fake.launches.size()); }
int launched_on() { return fake.launched_on; }
int last_error() { return fake.last_error; }
int64_t capacity() { return static_cast<int64_t>(inline_capacity(small_step())); }

// `size` bytes of step data, inline where `device_step` is null.
int launch_step(const unsigned char* step, int64_t size, void* device_step, int device, char* message, int64_t room) {
  StepLayout layout{};
  layout.size = static_cast<std::size_t>(size);
  return report(message, static_cast<std::size_t>(room),
                [&] { launch(small_step(), TableView{}, 3, layout, step, device_step, device, nullptr); });
}

// What the kernel got: its header's address of the step data, and the bytes beside it.
void* launched_step() {
  LaunchHeader header;
  std::memcpy(&header, fake.launches.back().parameters.data(), sizeof header);
  return const_cast<unsigned char*>(header.step);
}
const unsigned char* launched_bytes() { return fake.launches.back().parameters.data() + step_begins; }

// Launches a step of all tensors as launch_cuda of csrc/python/bindings.cpp does. `table`: what the CUDA backend sends
// to the device. `step`: the step's data with the places of gradients, keys, indices and scalars in it, as
// Table.write_step writes them. What the kernels get beyond the step's data is 0xa5. Where `device_step` is not null
// the device has begun the step there, and both are nothing.
int launch_table(int rule_index, int threshold_pass_index, int scaling_index, int64_t tensors, int64_t chunks,
                 const unsigned char* table, int64_t table_size, const unsigned char* step, const int64_t* offsets,
                 int64_t scalar_sets, void* sums, void* arrivals, void* chunk_statistics, void* device_step,
                 char* message, int64_t room) {
  return report(message, static_cast<std::size_t>(room), [&] {
    const auto count = static_cast<std::size_t>(tensors);
    const auto* const entries = entries_of(table, tensors, chunks, table_size);
    const bool plain = is_plain(entries, tensors);
    const auto layout = StepLayout::of(static_cast<std::size_t>(scalar_sets), count, plain ? 0 : count);
    std::vector<unsigned char> own(layout.size);
    if (device_step == nullptr) {
      std::vector<Scalars> scalars;
      const auto* const sets = reinterpret_cast<const double*>(step + offsets[3]);
      for (int64_t i = 0; i < scalar_sets; ++i) scalars.push_back(Scalars::from_set(sets + i * scalar_count));
      std::memcpy(own.data() + layout.scalars, scalars.data(), scalars.size() * sizeof(Scalars));
      std::memcpy(own.data() + layout.grads, step + offsets[0], count * sizeof(void*));
      if (!plain) std::memcpy(own.data() + layout.rng_keys, step + offsets[1], count * sizeof(RngKey));
      std::memcpy(own.data() + layout.scalar_indices, step + offsets[2], count * sizeof(uint32_t));
    }

    const TableView view{entries, reinterpret_cast<const uint32_t*>(entries + tensors), static_cast<Sums*>(sums),
                         static_cast<uint32_t*>(arrivals), static_cast<ChunkStatistics*>(chunk_statistics)};
    const Storage own_storage = plain ? Storage::plain : Storage::any;
    const bool alike = std::all_of(entries, entries + tensors,
                                   [entries](const TensorEntry& entry) { return entry.formats == entries->formats; });
    const auto scaling = static_cast<Scaling>(scaling_index);
    const auto run = [&](ThresholdPass which, Storage storage) {
      launch({static_cast<RuleIndex>(rule_index), which, storage, alike ? &entries->formats : nullptr,
              scaling_of(which, scaling)},
             view, static_cast<uint32_t>(chunks), layout, own.data(), device_step, 0, nullptr);
      auto& parameters = fake.launches.back().parameters;
      const auto used = step_begins + (device_step == nullptr ? layout.size : 0);
      std::fill(parameters.begin() + static_cast<std::ptrdiff_t>(used), parameters.end(), 0xa5);
    };
    auto threshold_pass = static_cast<ThresholdPass>(threshold_pass_index);
    if (threshold_pass == ThresholdPass::pass_before) {
      run(threshold_pass, own_storage);
      threshold_pass = ThresholdPass::none;
    }
    run(threshold_pass, chunk_statistics == nullptr ? own_storage : Storage::with_statistics);
  });
}

// As launch_cuda_norm and launch_cuda_begin of csrc/python/bindings.cpp do.
int launch_table_norm(int64_t tensors, int64_t chunks, const unsigned char* table, int64_t table_size,
                      const void* const* grads, double* sums, uint32_t* arrivals, double* totals, const int32_t* places,
                      char* message, int64_t room) {
  return report(message, static_cast<std::size_t>(room), [&] {
    const auto* const entries = entries_of(table, tensors, chunks, table_size);
    const TableView view{entries, reinterpret_cast<const uint32_t*>(entries + tensors), nullptr, nullptr, nullptr};
    launch_norm(view, {grads, sums, arrivals, totals, places}, static_cast<uint32_t>(chunks), 0, nullptr);
  });
}

int launch_table_begin(int64_t tensors, int64_t chunks, const unsigned char* table, int64_t table_size,
                       const void* entries, const void* programs, const int32_t* results, const double* values,
                       const double* control, const void* const* grads, unsigned char* step, int program_length,
                       int row_length, char* message, int64_t room) {
  return report(message, static_cast<std::size_t>(room), [&] {
    const auto count = static_cast<std::size_t>(tensors);
    const bool plain = is_plain(entries_of(table, tensors, chunks, table_size), tensors);
    BeginArguments arguments{};
    arguments.entries = static_cast<const BeginEntry*>(entries);
    arguments.programs = static_cast<const Instruction*>(programs);
    arguments.results = results;
    arguments.values = values;
    arguments.control = control;
    arguments.grads = grads;
    arguments.step = step;
    arguments.tensors = static_cast<int32_t>(tensors);
    arguments.program_length = program_length;
    arguments.row_length = row_length;
    launch_begin(arguments, StepLayout::of(count, count, plain ? 0 : count), 0, nullptr);
  });
}

// Of the data of a step that the device begins: tensors that draw random bits, all or none; bytes of the scalars of one
// tensor; bytes of all of it.
void device_step_sizes(int64_t tensors, int64_t chunks, const unsigned char* table, int64_t table_size,
                       int64_t* sizes) {
  const auto count = static_cast<std::size_t>(tensors);
  const std::size_t drawing = is_plain(entries_of(table, tensors, chunks, table_size), tensors) ? 0 : count;
  sizes[0] = static_cast<int64_t>(drawing);
  sizes[1] = sizeof(Scalars);
  sizes[2] = static_cast<int64_t>(StepLayout::of(count, count, drawing).size);
}

// Of a launch of a kernel that begins a step: which one, blocks, threads, bytes of parameters. Returns 1 where it is
// none.
int launched_begin(int index, int64_t* facts) {
  const FakeLaunch& launched = fake.launches[static_cast<std::size_t>(index)];
  const auto kernels = device_step_kernels();
  for (std::size_t i = 0; i < kernels.size(); ++i) {
    if (kernels[i].function != launched.function) continue;
    facts[0] = static_cast<int64_t>(i);
    facts[1] = launched.blocks;
    facts[2] = launched.threads;
    facts[3] = static_cast<int64_t>(launched.parameters.size());
    return 0;
  }
  return 1;
}

// Where the step's data lies in a kernel's parameters.
int64_t step_at() { return step_begins; }

// Of a launch: its kernel as rule, threshold pass and storage, blocks, threads, bytes of dynamic shared memory and of
// parameters, whether the kernel is one for fixed forms, whether it is scaled, and these forms: of parameter, gradient,
// the moments, and the parameter's storage. Returns 1 where it is no kernel of the project.
int launched_kernel(int index, int64_t* facts) {
  const FakeLaunch& launched = fake.launches[static_cast<std::size_t>(index)];
  Known known{};
  if (!find(launched.function, known)) return 1;
  std::fill_n(facts, 14, -1);
  facts[0] = known.rule;
  facts[1] = static_cast<int64_t>(known.threshold_pass);
  facts[2] = static_cast<int64_t>(known.storage);
  facts[3] = launched.blocks;
  facts[4] = launched.threads;
  facts[5] = static_cast<int64_t>(launched.dynamic_shared);
  facts[6] = static_cast<int64_t>(launched.parameters.size());
  facts[7] = known.formats != nullptr;
  facts[8] = known.is_scaled;
  if (known.formats == nullptr) return 0;
  facts[9] = static_cast<int64_t>(known.formats->param);
  facts[10] = static_cast<int64_t>(known.formats->grad);
  facts[11] = static_cast<int64_t>(known.formats->exp_avg);
  facts[12] = static_cast<int64_t>(known.formats->exp_avg_sq);
  facts[13] = static_cast<int64_t>(known.formats->param_storage);
  return 0;
}
const unsigned char* launched_parameters(int index) {
  return fake.launches[static_cast<std::size_t>(index)].parameters.data();
}

int read_kernel_info(int device, char* message, int64_t room) {
  return report(message, static_cast<std::size_t>(room), [&] { kernel_info(device); });
}

int is_usable(int device) { return unusable_reason(device).empty(); }
}
