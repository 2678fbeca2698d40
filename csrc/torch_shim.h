// What torch says of a tensor at this moment, through the C interface that libtorch exports for ahead-of-time compiled
// models. It is looked up in the library that the process has loaded; nothing is linked and no torch header is needed.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace signadam {

namespace py = pybind11;

// `sizes` and `strides` lie in the tensor and live as long as it does.
struct TensorView {
  void* address;
  int64_t storage_bytes, storage_offset, dim;
  const int64_t *sizes, *strides;
  int32_t dtype, device_type, device_index;  // torch's numbers
};

class TorchShim {
 public:
  // `library`: path of the loaded libtorch_cpu. `tensor_type`: torch._C.TensorBase. `samples`: some tensors, in whose
  // objects the handle is found.
  // Throws std::runtime_error where the library, a function or the handle is not found.
  TorchShim(const char* library, const py::object& tensor_type, const py::list& samples);

  // False for what is no tensor, or one that torch cannot describe this way (sparse, functorch's). No owner is made.
  bool look(PyObject* object, TensorView& view) const;

 private:
  using Handle = void*;
  template <class T>
  using Getter = int32_t (*)(Handle tensor, T* result);

  Getter<void*> data_ptr_;
  Getter<int64_t> storage_size_, storage_offset_, dim_;
  Getter<int64_t*> sizes_, strides_;
  Getter<int32_t> dtype_, device_type_, device_index_, layout_;
  int32_t strided_;
  PyTypeObject* tensor_type_;
  std::size_t handle_offset_;  // of the at::Tensor in torch's Python object
};

}  // namespace signadam
