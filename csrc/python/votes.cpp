#include "votes.h"

#include <pybind11/stl.h>

#include "../cpu/vote.h"

#if defined(SIGNADAM_CUDA)
#include "../cuda/vote.h"
#endif

namespace signadam {
namespace {

namespace py = pybind11;

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

VoteOptions options_of(VoteMemory memory, bool residual, bool maximize, bool abstains) {
  return {memory, residual, maximize, abstains ? 0 : spoiled_code(2)};
}

VoteTable table_of(uintptr_t entries, uintptr_t entry_of_chunk, int64_t chunks, uintptr_t scalars) {
  return {pointer<const VoteEntry>(entries), pointer<const int32_t>(entry_of_chunk), chunks,
          pointer<const VoteScalars>(scalars)};
}

}  // namespace

void add_votes(py::module_& m) {
  py::enum_<VoteMemory>(m, "VoteMemory")
      .value("NONE", VoteMemory::none)
      .value("GRADIENTS", VoteMemory::gradients)
      .value("GATED_SIGNS", VoteMemory::gated_signs);
  py::enum_<VoteUse>(m, "VoteUse")
      .value("WRITE", VoteUse::write)
      .value("STEP", VoteUse::step)
      .value("STEP_STOCHASTIC", VoteUse::step_stochastic);
  py::list scalars;
#define SIGNADAM_APPEND(field) scalars.append(#field);
  SIGNADAM_VOTE_SCALARS(SIGNADAM_APPEND)
#undef SIGNADAM_APPEND
  m.attr("VOTE_SCALARS") = py::tuple(scalars);
  m.attr("VOTE_CHUNK") = vote_chunk;
  m.attr("CODES_PER_WORD") = codes_per_word;

  const auto no_lock = py::call_guard<py::gil_scoped_release>();
  m.def(
      "cast_votes",
      [](uintptr_t entries, uintptr_t entry_of_chunk, int64_t chunks, uintptr_t scalars, VoteMemory memory,
         bool residual, bool maximize, bool abstains, int format, uintptr_t codes, int threads) {
        cpu::cast_votes(table_of(entries, entry_of_chunk, chunks, scalars),
                        options_of(memory, residual, maximize, abstains), static_cast<Format>(format),
                        pointer<uint32_t>(codes), threads);
      },
      no_lock, py::kw_only(), py::arg("entries"), py::arg("entry_of_chunk"), py::arg("chunks"), py::arg("scalars"),
      py::arg("memory"), py::arg("residual"), py::arg("maximize"), py::arg("abstains"), py::arg("format"),
      py::arg("codes"), py::arg("threads"));
  m.def(
      "count_votes",
      [](uintptr_t codes, int64_t workers, int64_t words, int bits, bool majority, uintptr_t result, int threads) {
        cpu::count_votes(pointer<const uint32_t>(codes), workers, words, bits, majority, pointer<uint32_t>(result),
                         threads);
      },
      no_lock, py::kw_only(), py::arg("codes"), py::arg("workers"), py::arg("words"), py::arg("bits"),
      py::arg("majority"), py::arg("result"), py::arg("threads"));
  m.def(
      "read_votes",
      [](uintptr_t entries, uintptr_t entry_of_chunk, int64_t chunks, uintptr_t scalars, uintptr_t keys, VoteUse use,
         int format, int bits, float divisor, uintptr_t result, int threads) {
        cpu::read_votes(table_of(entries, entry_of_chunk, chunks, scalars), pointer<const RngKey>(keys), use,
                        static_cast<Format>(format), bits, divisor, pointer<const uint32_t>(result), threads);
      },
      no_lock, py::kw_only(), py::arg("entries"), py::arg("entry_of_chunk"), py::arg("chunks"), py::arg("scalars"),
      py::arg("keys"), py::arg("use"), py::arg("format"), py::arg("bits"), py::arg("divisor"), py::arg("result"),
      py::arg("threads"));
#if defined(SIGNADAM_CUDA)
  m.def(
      "cuda_cast_votes",
      [](uintptr_t entries, uintptr_t entry_of_chunk, int64_t chunks, uintptr_t scalars, VoteMemory memory,
         bool residual, bool maximize, bool abstains, int format, uintptr_t codes, int device, uintptr_t stream) {
        cuda::cast_votes(table_of(entries, entry_of_chunk, chunks, scalars),
                         options_of(memory, residual, maximize, abstains), static_cast<Format>(format),
                         pointer<uint32_t>(codes), device, pointer<void>(stream));
      },
      no_lock, py::kw_only(), py::arg("entries"), py::arg("entry_of_chunk"), py::arg("chunks"), py::arg("scalars"),
      py::arg("memory"), py::arg("residual"), py::arg("maximize"), py::arg("abstains"), py::arg("format"),
      py::arg("codes"), py::arg("device"), py::arg("stream"));
  m.def(
      "cuda_count_votes",
      [](uintptr_t codes, int64_t workers, int64_t words, int bits, bool majority, uintptr_t result, int device,
         uintptr_t stream) {
        cuda::count_votes(pointer<const uint32_t>(codes), workers, words, bits, majority, pointer<uint32_t>(result),
                          device, pointer<void>(stream));
      },
      no_lock, py::kw_only(), py::arg("codes"), py::arg("workers"), py::arg("words"), py::arg("bits"),
      py::arg("majority"), py::arg("result"), py::arg("device"), py::arg("stream"));
  m.def(
      "cuda_read_votes",
      [](uintptr_t entries, uintptr_t entry_of_chunk, int64_t chunks, uintptr_t scalars, uintptr_t keys, VoteUse use,
         int format, int bits, float divisor, uintptr_t result, int device, uintptr_t stream) {
        cuda::read_votes(table_of(entries, entry_of_chunk, chunks, scalars), pointer<const RngKey>(keys), use,
                         static_cast<Format>(format), bits, divisor, pointer<const uint32_t>(result), device,
                         pointer<void>(stream));
      },
      no_lock, py::kw_only(), py::arg("entries"), py::arg("entry_of_chunk"), py::arg("chunks"), py::arg("scalars"),
      py::arg("keys"), py::arg("use"), py::arg("format"), py::arg("bits"), py::arg("divisor"), py::arg("result"),
      py::arg("device"), py::arg("stream"));
#endif
}

}  // namespace signadam
