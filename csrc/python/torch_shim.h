// What torch says of a tensor at this moment, through the C interface that libtorch exports for ahead-of-time compiled
// models. It is looked up in the library that the process has loaded; nothing is linked and no torch header is needed.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "torch_objects.h"

namespace signadam {

namespace py = pybind11;

// `sizes` and `strides` lie in the tensor and live as long as it does; without dimensions they are null. All CPU
// tensors have the device index 0.
struct TensorView {
  void* address;
  int64_t storage_bytes, storage_offset, dim;
  const int64_t *sizes, *strides;
  int32_t dtype, device_type, device_index;  // torch's numbers
};

class TorchShim {
 public:
  // `library`: path of the loaded libtorch_cpu. `tensor_type`: torch._C.TensorBase. `samples`: some tensors, see
  // TorchObjects.
  // Throws std::runtime_error where the library, a function or the handle is not found.
  TorchShim(const char* library, const py::object& tensor_type, const py::list& samples);

  bool is_tensor(PyObject* object) const {
    PyTypeObject* const type = Py_TYPE(object);
    return type == plain_types_[0] || type == plain_types_[1] || PyType_IsSubtype(type, tensor_type_);
  }
  // Whether it is a tensor with strides. What is not, answers `look` by an exception that torch logs.
  bool is_strided(PyObject* object) const;
  // False for what is no tensor, or one that torch cannot describe this way (sparse, functorch's). No owner is made.
  bool look(PyObject* object, TensorView& view) const;

  // Whether an object is the tensor that had that trace, unchanged.
  bool follows(PyObject* object, const Trace& trace) const {
    return is_tensor(object) && objects_.follows(object, trace);
  }

  int32_t cpu() const { return cpu_; }
  const TorchObjects& objects() const { return objects_; }

 private:
  using Handle = void*;
  template <class T>
  using Getter = int32_t (*)(Handle tensor, T* result);

  Handle handle_of(PyObject* object) const { return reinterpret_cast<char*>(object) + objects_.handle_offset(); }

  TorchObjects objects_;
  Getter<void*> data_ptr_;
  Getter<int64_t> storage_size_, storage_offset_, dim_;
  Getter<int64_t*> sizes_, strides_;
  Getter<int32_t> dtype_, device_type_, device_index_, layout_;
  int32_t strided_ = 0, cpu_;
  py::object strided_object_;  // torch.strided
  PyTypeObject* tensor_type_;
  PyTypeObject* plain_types_[2];  // those of the first two samples, which nearly all tensors have
};

}  // namespace signadam
