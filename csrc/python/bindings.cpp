// The Python module signadam_ext._C. Addresses, numbers and a stream cross it; no tensor does.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <limits>
#include <optional>
#include <stdexcept>

#include "../core/program.h"
#include "../cpu/float_environment.h"
#include "../cpu/kernels.h"
#include "../cpu/pages.h"
#include "../cpu/step.h"
#include "commit.h"
#include "gradient_reader.h"
#include "host_table.h"
#include "votes.h"

#if defined(SIGNADAM_CUDA)
#include "../cuda/device_step.h"
#endif

#define SIGNADAM_STRING2(x) #x
#define SIGNADAM_STRING(x) SIGNADAM_STRING2(x)

namespace signadam {
namespace {

using ScalarSet = std::array<double, scalar_count>;

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

std::vector<Scalars> to_scalars(const std::vector<ScalarSet>& sets) {
  // torch.set_flush_denormal must not turn a tiny learning rate into none.
  const cpu::FloatEnvironment ieee;
  std::vector<Scalars> scalars;
  scalars.reserve(sets.size());
  for (const ScalarSet& set : sets) scalars.push_back(Scalars::from_set(set.data()));
  return scalars;
}

template <class T>
py::bytes bytes_of(const std::vector<T>& x) {
  return {reinterpret_cast<const char*>(x.data()), x.size() * sizeof(T)};
}

const char* compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#else
  return "g++ " __VERSION__;
#endif
}

py::dict build_info() {
  py::dict info;
  info["version"] = SIGNADAM_STRING(SIGNADAM_VERSION);
  info["commit"] = SIGNADAM_STRING(SIGNADAM_COMMIT);
  info["compiler"] = compiler();
  info["python"] = PY_VERSION;
#if defined(SIGNADAM_CUDA)
  info["cuda"] = SIGNADAM_STRING(SIGNADAM_NVCC);
  info["cuda_architectures"] = SIGNADAM_STRING(SIGNADAM_CUDA_ARCHS);
#else
  info["cuda"] = py::none();
  info["cuda_architectures"] = "";
#endif
  return info;
}

// Step data for a kernel that takes doubles (Triton): gradient addresses, keys of random bits, indices of scalars,
// scalars; their offsets and the size. Each begins on a 16-byte boundary: Triton compiles another kernel for every
// combination of arguments that do.
std::array<std::size_t, 5> step_layout(std::size_t tensors, std::size_t scalar_sets) {
  const auto aligned = [](std::size_t bytes) { return (bytes + 15) / 16 * 16; };
  const std::size_t rng_keys_at = aligned(tensors * sizeof(void*));
  const std::size_t scalar_indices_at = aligned(rng_keys_at + tensors * sizeof(RngKey));
  const std::size_t scalars_at = aligned(scalar_indices_at + tensors * sizeof(uint32_t));
  return {0, rng_keys_at, scalar_indices_at, scalars_at, scalars_at + scalar_sets * sizeof(ScalarSet)};
}

void write_step(const HostTable& table, const std::vector<ScalarSet>& sets, uintptr_t address) {
  const auto [grads_at, rng_keys_at, scalar_indices_at, scalars_at, size] = step_layout(table.size(), sets.size());
  std::memcpy(pointer<char>(address + grads_at), table.grads().data(), table.size() * sizeof(void*));
  std::memcpy(pointer<char>(address + rng_keys_at), table.rng_keys().data(), table.rng_keys().size() * sizeof(RngKey));
  std::memcpy(pointer<char>(address + scalar_indices_at), table.scalar_indices().data(),
              table.size() * sizeof(uint32_t));
  std::memcpy(pointer<char>(address + scalars_at), sets.data(), size - scalars_at);
}

#if defined(SIGNADAM_CUDA)
cuda::StepLayout cuda_layout(const HostTable& table, std::size_t scalar_sets) {
  return cuda::StepLayout::of(scalar_sets, table.size(), table.rng_keys().size());
}

std::size_t cuda_step_bytes(const HostTable& table, std::size_t scalar_sets) {
  return cuda_layout(table, scalar_sets).size;
}

// Writes the step data of a CUDA kernel to host memory of `cuda_step_bytes()`.
void write_cuda_step(const HostTable& table, const std::vector<ScalarSet>& sets, uintptr_t address) {
  const auto scalars = to_scalars(sets);
  const auto layout = cuda_layout(table, sets.size());
  std::memcpy(pointer<char>(address + layout.scalars), scalars.data(), scalars.size() * sizeof(Scalars));
  std::memcpy(pointer<char>(address + layout.grads), table.grads().data(), table.size() * sizeof(void*));
  std::memcpy(pointer<char>(address + layout.rng_keys), table.rng_keys().data(),
              table.rng_keys().size() * sizeof(RngKey));
  std::memcpy(pointer<char>(address + layout.scalar_indices), table.scalar_indices().data(),
              table.size() * sizeof(uint32_t));
}

// The kernels of a step, in the order of their launches.
std::vector<cuda::KernelChoice> cuda_kernels(const HostTable& table, int rule_index, ThresholdPass threshold_pass,
                                             Scaling scaling, bool with_statistics) {
  const auto rule = static_cast<RuleIndex>(rule_index);
  const Storage storage = with_statistics ? Storage::with_statistics : table.storage();
  const auto choice = [&](ThresholdPass which, Storage of_tables) {
    return cuda::KernelChoice{rule, which, of_tables, table.formats(), scaling_of(which, scaling)};
  };
  if (threshold_pass != ThresholdPass::pass_before) return {choice(threshold_pass, storage)};
  return {choice(ThresholdPass::pass_before, table.storage()), choice(ThresholdPass::none, storage)};
}

std::size_t cuda_inline_capacity(const HostTable& table, int rule_index, ThresholdPass threshold_pass, Scaling scaling,
                                 bool with_statistics) {
  std::size_t least = std::numeric_limits<std::size_t>::max();
  for (const auto& choice : cuda_kernels(table, rule_index, threshold_pass, scaling, with_statistics))
    least = std::min(least, cuda::inline_capacity(choice));
  return least;
}

TableView device_view(const HostTable& table, uintptr_t device_table, uintptr_t sums = 0, uintptr_t arrivals = 0,
                      uintptr_t chunk_statistics = 0) {
  const auto* entries = pointer<const TensorEntry>(device_table);
  return {entries, reinterpret_cast<const uint32_t*>(entries + table.size()), pointer<Sums>(sums),
          pointer<uint32_t>(arrivals), pointer<ChunkStatistics>(chunk_statistics)};
}

// `device_step`: where the stream finds what `write_cuda_step` wrote; 0: it travels in the kernel's parameters. Without
// sets: what `launch_cuda_begin` left.
void launch_cuda(const HostTable& table, int rule_index, ThresholdPass threshold_pass, Scaling scaling,
                 const std::optional<std::vector<ScalarSet>>& sets, uintptr_t device_table, uintptr_t sums,
                 uintptr_t arrivals, uintptr_t chunk_statistics, uintptr_t device_step, int device, uintptr_t stream) {
  const auto layout = cuda_layout(table, sets ? sets->size() : table.size());
  std::vector<unsigned char> own;
  if (device_step == 0) {
    if (!sets) throw std::invalid_argument("a step that the device has begun lies on the device");
    own.resize(layout.size);
    write_cuda_step(table, *sets, reinterpret_cast<uintptr_t>(own.data()));
  }
  const TableView view = device_view(table, device_table, sums, arrivals, chunk_statistics);
  const auto kernels = cuda_kernels(table, rule_index, threshold_pass, scaling, chunk_statistics != 0);
  py::gil_scoped_release release;
  for (const auto& choice : kernels)
    cuda::launch(choice, view, table.chunks(), layout, own.data(), pointer<void>(device_step), device,
                 pointer<void>(stream));
}

// Of the step's data where the device begins steps.
std::size_t cuda_device_step_bytes(const HostTable& table) { return cuda_step_bytes(table, table.size()); }

void launch_cuda_norm(const HostTable& table, uintptr_t device_table, uintptr_t grads, uintptr_t sums,
                      uintptr_t arrivals, uintptr_t totals, uintptr_t places, int device, uintptr_t stream) {
  const NormView norm{pointer<const void* const>(grads), pointer<double>(sums), pointer<uint32_t>(arrivals),
                      pointer<double>(totals), pointer<const int32_t>(places)};
  py::gil_scoped_release release;
  cuda::launch_norm(device_view(table, device_table), norm, table.chunks(), device, pointer<void>(stream));
}

void launch_cuda_begin(const HostTable& table, uintptr_t entries, uintptr_t programs, uintptr_t results,
                       uintptr_t values, uintptr_t control, uintptr_t grads, uintptr_t step, int program_length,
                       int row_length, int device, uintptr_t stream) {
  cuda::BeginArguments arguments{};
  arguments.entries = pointer<const cuda::BeginEntry>(entries);
  arguments.programs = pointer<const Instruction>(programs);
  arguments.results = pointer<const int32_t>(results);
  arguments.values = pointer<const double>(values);
  arguments.control = pointer<const double>(control);
  arguments.grads = pointer<const void* const>(grads);
  arguments.step = pointer<unsigned char>(step);
  arguments.tensors = static_cast<int32_t>(table.size());
  arguments.program_length = program_length;
  arguments.row_length = row_length;
  const auto layout = cuda_layout(table, table.size());
  py::gil_scoped_release release;
  cuda::launch_begin(arguments, layout, device, pointer<void>(stream));
}
#endif

}  // namespace
}  // namespace signadam

PYBIND11_MODULE(_C, m) {
  using namespace signadam;
  // As ValueError with the two numbers in `args`.
  py::register_exception_translator([](std::exception_ptr thrown) {
    try {
      if (thrown) std::rethrow_exception(thrown);
    } catch (const BadStepCount& bad) {
      const py::tuple arguments = py::make_tuple(bad.index, bad.count);
      PyErr_SetObject(PyExc_ValueError, arguments.ptr());
    }
  });
  m.doc() = "Compiled kernels of signadam_ext.";

  m.def("build_info", &build_info);
  m.def("cpu_capability", [] { return cpu::kernels().name; });
  py::list scalars;
#define SIGNADAM_APPEND(field) scalars.append(#field);
  SIGNADAM_SCALARS(SIGNADAM_APPEND)
#undef SIGNADAM_APPEND
  m.attr("SCALARS") = py::tuple(scalars);
  py::list operations;
#define SIGNADAM_APPEND(name) operations.append(#name);
  SIGNADAM_OPERATIONS(SIGNADAM_APPEND)
#undef SIGNADAM_APPEND
  m.attr("OPERATIONS") = py::tuple(operations);
  m.attr("PROGRAM_REGISTERS") = program_registers;
  py::list rules;
#define SIGNADAM_APPEND(Rule) rules.append(Rule::name);
  SIGNADAM_RULES(SIGNADAM_APPEND)
#undef SIGNADAM_APPEND
  m.attr("RULES") = py::tuple(rules);
  // By its name, what a format is called by in tables and kernels, and the bits of an element.
  py::dict formats;
#define SIGNADAM_APPEND(name) formats[#name] = py::make_tuple(static_cast<int>(Format::name), bits_of(Format::name));
  SIGNADAM_FORMATS(SIGNADAM_APPEND)
#undef SIGNADAM_APPEND
  m.attr("FORMATS") = formats;
  py::dict storages;
#define SIGNADAM_APPEND(name) storages[#name] = static_cast<int>(ParamStorage::name);
  SIGNADAM_PARAM_STORAGES(SIGNADAM_APPEND)
#undef SIGNADAM_APPEND
  m.attr("PARAM_STORAGES") = storages;
  py::list chunk_statistics;
#define SIGNADAM_APPEND(name) chunk_statistics.append(#name);
  SIGNADAM_CHUNK_STATISTICS(SIGNADAM_APPEND)
#undef SIGNADAM_APPEND
  m.attr("CHUNK_STATISTICS") = py::tuple(chunk_statistics);
  m.attr("RUN") = packed_run;
  m.attr("LANES") = lane_count;
  m.attr("ROWS") = row_count;
  m.attr("CHUNK_SIZE") = chunk_size;
  m.attr("LEAST_SCALE") = least_scale;
  m.def("advise_huge_pages", &cpu::advise_huge_pages, py::arg("address"), py::arg("size"));
  m.def("step_layout", &step_layout, py::arg("tensors"), py::arg("scalar_sets"));

  py::class_<TorchShim>(m, "TorchShim")
      .def(py::init<const char*, const py::object&, const py::list&>(), py::arg("library"), py::arg("tensor_type"),
           py::arg("samples"))
      .def_property_readonly("recognises", [](const TorchShim& shim) { return shim.objects().recognises(); })
      .def_property_readonly("counts_versions", [](const TorchShim& shim) { return shim.objects().counts_versions(); })
      .def_property_readonly("knows_negation", [](const TorchShim& shim) { return shim.objects().knows_negation(); });

  py::class_<GradientReader>(m, "GradientReader")
      .def(py::init<const TorchShim*>(), py::keep_alive<1, 2>())
      .def("watch", &GradientReader::watch, py::arg("group"), py::arg("param"), py::arg("grad_strides"),
           py::arg("grad_like"), py::arg("state"), py::arg("spec"), py::arg("counts_there"))
      .def("read", &GradientReader::read, py::arg("param_groups"), py::arg("state"))
      .def("unchanged", &GradientReader::unchanged)
      .def("replace", &GradientReader::replace, py::arg("index"), py::arg("address"))
      .def("held", &GradientReader::held, py::arg("index"))
      .def("release", &GradientReader::release)
      .def("addresses", [](const GradientReader& reader) {
        std::vector<uintptr_t> addresses;
        for (void* grad : reader.grads()) addresses.push_back(reinterpret_cast<uintptr_t>(grad));
        return addresses;
      });

  py::class_<CpuLaunch>(m, "CpuLaunch");
  m.def("commit", &commit, py::arg("operations"), py::arg("tables"), py::arg("states"), py::arg("written"),
        py::arg("increment_version"), py::arg("guards"));

  m.def("ordered_sum", &cpu::ordered_sum, py::arg("x"));

  py::class_<HostTable>(m, "Table")
      .def(py::init<bool>(), py::arg("scalars_by_step"))
      .def(
          "add",
          [](HostTable& table, uintptr_t param, uintptr_t residual, uintptr_t exp_avg, uintptr_t exp_avg_sq,
             uintptr_t aux, uintptr_t threshold_state, uintptr_t step, bool step_is_double, int64_t numel,
             int64_t shard_offset, int param_format, int grad_format, int exp_avg_format, int exp_avg_sq_format,
             int aux_format, int param_storage, uint32_t group, std::size_t index, uint64_t seed, uint32_t param_id,
             const std::tuple<int64_t, int64_t, int64_t, int64_t>& shard_runs) {
            const auto format = [](int number) { return static_cast<Format>(number); };
            const Formats formats{format(param_format),   format(grad_format),
                                  format(exp_avg_format), format(exp_avg_sq_format),
                                  format(aux_format),     static_cast<ParamStorage>(param_storage)};
            // Packed codes are read and written by whole pieces, which must begin where they do.
            const uint8_t head = formats.packed() ? 0 : head_of(pointer<void>(param), formats.param);
            table.add({pointer<void>(param), pointer<void>(exp_avg), pointer<void>(exp_avg_sq), pointer<void>(aux),
                       pointer<double>(threshold_state), numel, 0, formats, head, pointer<void>(residual), shard_offset,
                       std::apply([](auto... runs) { return ShardRuns{runs...}; }, shard_runs)},
                      {pointer<void>(step), step_is_double}, group, index, seed, param_id);
          },
          py::kw_only(), py::arg("param"), py::arg("residual"), py::arg("exp_avg"), py::arg("exp_avg_sq"),
          py::arg("aux"), py::arg("threshold_state"), py::arg("step"), py::arg("step_is_double"), py::arg("numel"),
          py::arg("shard_offset"), py::arg("param_format"), py::arg("grad_format"), py::arg("exp_avg_format"),
          py::arg("exp_avg_sq_format"), py::arg("aux_format"), py::arg("param_storage"), py::arg("group"),
          py::arg("index"), py::arg("seed"), py::arg("param_id"),
          py::arg("shard_runs") = std::tuple<int64_t, int64_t, int64_t, int64_t>{})
      .def("finish", &HostTable::finish, py::arg("sums"))
      .def("begin", [](HostTable& table, const GradientReader& reader) { return table.begin(reader.grads()); })
      .def("begin",
           [](HostTable& table, const std::vector<uintptr_t>& addresses) {
             std::vector<void*> grads;
             for (const uintptr_t address : addresses) grads.push_back(pointer<void>(address));
             return table.begin(grads);
           })
      .def("commit", &HostTable::commit)
      .def("grads",
           [](const HostTable& table) {
             std::vector<bool> present;
             for (const void* grad : table.grads()) present.push_back(grad != nullptr);
             return present;
           })
      .def("scalar_indices", &HostTable::scalar_indices)
      .def("squares", &HostTable::squares, py::arg("threads"), py::call_guard<py::gil_scoped_release>())
      .def("__len__", &HostTable::size)
      .def_property_readonly("chunks", &HostTable::chunks)
      .def("chunk_bytes", [](const HostTable& table) { return bytes_of(table.tensor_of_chunk()); })
      .def("device_bytes",
           [](const HostTable& table) { return bytes_of(table.tensors()) + bytes_of(table.tensor_of_chunk()); })
      .def("write_step", &write_step, py::arg("scalars"), py::arg("address"))
#if defined(SIGNADAM_CUDA)
      .def("cuda_step_bytes", &cuda_step_bytes, py::arg("scalar_sets"))
      .def("cuda_inline_capacity", &cuda_inline_capacity, py::arg("rule"), py::arg("threshold_pass"),
           py::arg("scaling"), py::arg("with_statistics"))
      .def("write_cuda_step", &write_cuda_step, py::arg("scalars"), py::arg("address"))
      .def("launch_cuda", &launch_cuda, py::arg("rule"), py::arg("threshold_pass"), py::arg("scaling"),
           py::arg("scalars"), py::kw_only(), py::arg("device_table"), py::arg("sums"), py::arg("arrivals"),
           py::arg("chunk_statistics"), py::arg("device_step"), py::arg("device"), py::arg("stream"))
      .def("cuda_device_step_bytes", &cuda_device_step_bytes)
      .def("launch_cuda_norm", &launch_cuda_norm, py::kw_only(), py::arg("device_table"), py::arg("grads"),
           py::arg("sums"), py::arg("arrivals"), py::arg("totals"), py::arg("places"), py::arg("device"),
           py::arg("stream"))
      .def("launch_cuda_begin", &launch_cuda_begin, py::kw_only(), py::arg("entries"), py::arg("programs"),
           py::arg("results"), py::arg("values"), py::arg("control"), py::arg("grads"), py::arg("step"),
           py::arg("program_length"), py::arg("row_length"), py::arg("device"), py::arg("stream"))
#endif
      .def(
          "cpu_launch",
          [](HostTable& table, int rule, ThresholdPass threshold_pass, const std::vector<ScalarSet>& sets, int threads,
             uintptr_t chunk_statistics) {
            return CpuLaunch{&table,         static_cast<RuleIndex>(rule),
                             threshold_pass, to_scalars(sets),
                             threads,        pointer<ChunkStatistics>(chunk_statistics)};
          },
          py::keep_alive<0, 1>(), py::arg("rule"), py::arg("threshold_pass"), py::arg("scalars"), py::arg("threads"),
          py::arg("chunk_statistics"));

  py::enum_<ThresholdPass>(m, "ThresholdPass")
      .value("NONE", ThresholdPass::none)
      .value("SAME_PASS", ThresholdPass::same_pass)
      .value("PASS_BEFORE", ThresholdPass::pass_before);

  py::enum_<Scaling>(m, "Scaling")
      .value("NONE", Scaling::none)
      .value("NORM", Scaling::norm)
      .value("STEPS", Scaling::steps);

  add_votes(m);

#if defined(SIGNADAM_CUDA)
  m.def("cuda_runtime_version", &cuda::runtime_version);
  m.def("cuda_unusable_reason", &cuda::unusable_reason, py::arg("device"));
  m.def("cuda_kernel_info", [](int device) {
    py::list infos;
    for (const auto& k : cuda::kernel_info(device)) {
      py::dict info;
      info["name"] = k.name;
      info["registers"] = k.registers;
      info["shared_bytes"] = k.shared_bytes;
      info["local_bytes"] = k.local_bytes;
      info["threads_per_block"] = k.max_threads;
      info["blocks_per_multiprocessor"] = k.blocks_per_multiprocessor;
      infos.append(info);
    }
    return infos;
  });
#endif
}
