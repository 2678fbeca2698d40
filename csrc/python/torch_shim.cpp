#include "torch_shim.h"

#include <dlfcn.h>

#include <stdexcept>
#include <string>

namespace signadam {

TorchShim::TorchShim(const char* library, const py::object& tensor_type, const py::list& samples)
    : objects_(samples), tensor_type_(reinterpret_cast<PyTypeObject*>(tensor_type.ptr())) {
  plain_types_[0] = plain_types_[1] = tensor_type_;
  for (std::size_t i = 0; i < samples.size() && i < 2; ++i) plain_types_[i] = Py_TYPE(samples[i].ptr());
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
  int32_t (*number)();
  // torch 2.6 has none: there the objects themselves are asked.
  layout_ = reinterpret_cast<Getter<int32_t>>(dlsym(loaded, "aoti_torch_get_layout"));
  if (layout_ != nullptr) {
    find(number, "aoti_torch_layout_strided");
    strided_ = number();
  }
  strided_object_ = samples[0].attr("layout");
  find(number, "aoti_torch_device_type_cpu");
  cpu_ = number();
}

bool TorchShim::is_strided(PyObject* object) const {
  if (!is_tensor(object)) return false;
  if (layout_ == nullptr) {
    // A subclass might answer by code of its own.
    const bool is_plain = Py_TYPE(object) == plain_types_[0] || Py_TYPE(object) == plain_types_[1];
    return is_plain && py::object(py::handle(object).attr("layout")).is(strided_object_);
  }
  int32_t layout = 0;
  return layout_(handle_of(object), &layout) == 0 && layout == strided_;
}

bool TorchShim::look(PyObject* object, TensorView& view) const {
  if (!is_tensor(object)) return false;
  const Handle tensor = handle_of(object);
  if (storage_size_(tensor, &view.storage_bytes) != 0 || data_ptr_(tensor, &view.address) != 0 ||
      storage_offset_(tensor, &view.storage_offset) != 0 || dim_(tensor, &view.dim) != 0 ||
      dtype_(tensor, &view.dtype) != 0 || device_type_(tensor, &view.device_type) != 0)
    return false;
  view.sizes = view.strides = nullptr;
  if (view.dim != 0) {
    int64_t *sizes = nullptr, *strides = nullptr;
    if (sizes_(tensor, &sizes) != 0 || strides_(tensor, &strides) != 0) return false;
    view.sizes = sizes;
    view.strides = strides;
  }
  view.device_index = 0;
  return view.device_type == cpu_ || device_index_(tensor, &view.device_index) == 0;
}

}  // namespace signadam
