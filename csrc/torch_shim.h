// What torch says of a tensor at this moment, through the C interface that libtorch exports for ahead-of-time compiled
// models. It is looked up in the library that the process has loaded; nothing is linked and no torch header is needed.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstring>

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

// A tensor is described through ten calls. Where it has not changed, its objects in memory show it faster: a hash of
// the bytes of a plain tensor and of its storage, but for their reference counts, is what it was when torch was last
// asked. Which bytes mean what is not known here, nor needed.
class TorchShim {
 public:
  // `library`: path of the loaded libtorch_cpu. `tensor_type`: torch._C.TensorBase. `samples`: some tensors, in whose
  // objects the handle is found.
  // Throws std::runtime_error where the library, a function or the handle is not found.
  TorchShim(const char* library, const py::object& tensor_type, const py::list& samples);

  // False for what is no tensor, or one that torch cannot describe this way (sparse, functorch's). No owner is made.
  bool look(PyObject* object, TensorView& view) const;
  // The hash for a tensor that `look` describes so; 0 where there is none: torch's objects are not as expected, it is
  // another kind of tensor, or has more dimensions than lie in its object.
  uint64_t trace(PyObject* object, const TensorView& view) const;
  // Whether the tensor is as it was when it had that trace.
  bool follows(PyObject* object, uint64_t trace) const {
    if (trace == 0 || !is_tensor(object)) return false;
    const char* const tensor = tensor_of(object);
    return word_at<const void*>(tensor, 0) == tensor_class_ && hash(tensor) == trace;
  }

  int32_t cpu() const { return cpu_; }

  // Whether it is a tensor with strides. What is not, answers `look` by an exception that torch logs.
  bool is_strided(PyObject* object) const;

 private:
  bool is_tensor(PyObject* object) const {
    PyTypeObject* const type = Py_TYPE(object);
    return type == plain_types_[0] || type == plain_types_[1] || PyType_IsSubtype(type, tensor_type_);
  }

  template <class T>
  static T word_at(const char* object, std::size_t offset) {
    T word;
    std::memcpy(&word, object + offset, sizeof(word));
    return word;
  }
  const char* tensor_of(PyObject* object) const {
    return word_at<const char*>(reinterpret_cast<const char*>(object), handle_offset_);
  }
  // Never 0.
  uint64_t hash(const char* tensor) const;

  using Handle = void*;
  template <class T>
  using Getter = int32_t (*)(Handle tensor, T* result);

  Getter<void*> data_ptr_;
  Getter<int64_t> storage_size_, storage_offset_, dim_;
  Getter<int64_t*> sizes_, strides_;
  Getter<int32_t> dtype_, device_type_, device_index_, layout_;
  int32_t strided_, cpu_;
  PyTypeObject* tensor_type_;
  PyTypeObject* plain_types_[2];  // those of the first two samples, which nearly all tensors have
  std::size_t handle_offset_;     // of the at::Tensor in torch's Python object

  void find_objects(const py::list& samples);
  const void *tensor_class_ = nullptr, *storage_class_ = nullptr;  // of plain ones: their virtual tables
  std::size_t storage_at_ = 0, tensor_bytes_ = 0;  // where a tensor names its storage, and the bytes from there on
  std::size_t data_at_ = 0, storage_bytes_ = 0;    // where a storage names its memory, and the bytes from there on
};

}  // namespace signadam
