#include "torch_shim.h"

#include <dlfcn.h>

#include <cstring>
#include <stdexcept>
#include <string>

namespace signadam {
namespace {

// Where the object holds the address that torch calls `_cdata`: the one word of its at::Tensor.
std::size_t find_handle(const py::list& samples) {
  std::size_t found = 0;
  for (const auto& sample : samples) {
    const auto wanted = sample.attr("_cdata").cast<uintptr_t>();
    const auto size = static_cast<std::size_t>(Py_TYPE(sample.ptr())->tp_basicsize);
    std::size_t at = sizeof(PyObject);
    uintptr_t word = 0;
    for (; at + sizeof(word) <= size; at += sizeof(word)) {
      std::memcpy(&word, reinterpret_cast<const char*>(sample.ptr()) + at, sizeof(word));
      if (word == wanted) break;
    }
    if (word != wanted || (found != 0 && found != at)) throw std::runtime_error("torch's tensor objects are unknown");
    found = at;
  }
  if (found == 0) throw std::runtime_error("no sample tensors");
  return found;
}

}  // namespace

TorchShim::TorchShim(const char* library, const py::object& tensor_type, const py::list& samples)
    : tensor_type_(reinterpret_cast<PyTypeObject*>(tensor_type.ptr())), handle_offset_(find_handle(samples)) {
  void* const loaded = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
  if (loaded == nullptr) throw std::runtime_error(std::string(library) + " is not loaded");
  const auto find = [loaded](auto& function, const char* name) {
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(loaded, name));
    if (function == nullptr) throw std::runtime_error(std::string("torch has no ") + name);
  };
  find(data_ptr_, "aoti_torch_get_data_ptr");
  find(storage_size_, "aoti_torch_get_storage_size");
  find(storage_offset_, "aoti_torch_get_storage_offset");
  find(dim_, "aoti_torch_get_dim");
  find(sizes_, "aoti_torch_get_sizes");
  find(strides_, "aoti_torch_get_strides");
  find(dtype_, "aoti_torch_get_dtype");
  find(device_type_, "aoti_torch_get_device_type");
  find(device_index_, "aoti_torch_get_device_index");
  find(layout_, "aoti_torch_get_layout");
  int32_t (*strided)();
  find(strided, "aoti_torch_layout_strided");
  strided_ = strided();
}

bool TorchShim::look(PyObject* object, TensorView& view) const {
  if (!PyObject_TypeCheck(object, tensor_type_)) return false;
  const Handle tensor = reinterpret_cast<char*>(object) + handle_offset_;
  int64_t *sizes = nullptr, *strides = nullptr;
  int32_t layout = 0;
  // The layout comes first: what has no storage answers the other questions by an exception.
  if (layout_(tensor, &layout) != 0 || layout != strided_ || storage_size_(tensor, &view.storage_bytes) != 0 ||
      data_ptr_(tensor, &view.address) != 0 || storage_offset_(tensor, &view.storage_offset) != 0 ||
      dim_(tensor, &view.dim) != 0 || sizes_(tensor, &sizes) != 0 || strides_(tensor, &strides) != 0 ||
      dtype_(tensor, &view.dtype) != 0 || device_type_(tensor, &view.device_type) != 0 ||
      device_index_(tensor, &view.device_index) != 0)
    return false;
  view.sizes = sizes;
  view.strides = strides;
  return true;
}

}  // namespace signadam
