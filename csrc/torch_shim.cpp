#include "torch_shim.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(__linux__)
#include <malloc.h>
#endif

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

// Where an object holds a word; 0, which is never of interest, where it does not.
std::size_t find_word(const char* object, std::size_t size, uintptr_t wanted) {
  for (std::size_t at = 0; at + sizeof(wanted) <= size; at += sizeof(wanted))
    if (std::memcmp(object + at, &wanted, sizeof(wanted)) == 0) return at;
  return 0;
}

}  // namespace

TorchShim::TorchShim(const char* library, const py::object& tensor_type, const py::list& samples)
    : tensor_type_(reinterpret_cast<PyTypeObject*>(tensor_type.ptr())), handle_offset_(find_handle(samples)) {
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
  find(layout_, "aoti_torch_get_layout");
  int32_t (*number)();
  find(number, "aoti_torch_layout_strided");
  strided_ = number();
  find(number, "aoti_torch_device_type_cpu");
  cpu_ = number();
  find_objects(samples);
}

// Leaves everything at 0 where the samples do not agree.
void TorchShim::find_objects(const py::list& samples) {
#if defined(__linux__)
  for (const auto& sample : samples) {
    const auto* const tensor = reinterpret_cast<const char*>(sample.attr("_cdata").cast<uintptr_t>());
    const py::object own = sample.attr("untyped_storage")();
    const auto storage_address = own.attr("_cdata").cast<uintptr_t>();
    const auto* const storage = reinterpret_cast<const char*>(storage_address);
    // malloc may give a little more than was asked for: the least of some is the size.
    const std::size_t tensor_size = malloc_usable_size(const_cast<char*>(tensor));
    const std::size_t storage_size = malloc_usable_size(const_cast<char*>(storage));
    const std::size_t storage_at = find_word(tensor, tensor_size, storage_address);
    const std::size_t data_at = find_word(storage, storage_size, sample.attr("data_ptr")().cast<uintptr_t>());
    const bool is_first = tensor_class_ == nullptr;
    const bool agrees = is_first || (tensor_class_ == word_at<const void*>(tensor, 0) &&
                                     storage_class_ == word_at<const void*>(storage, 0) && storage_at_ == storage_at &&
                                     data_at_ == data_at);
    if (storage_at == 0 || data_at == 0 || !agrees) {
      tensor_bytes_ = storage_bytes_ = 0;
      return;
    }
    tensor_class_ = word_at<const void*>(tensor, 0);
    storage_class_ = word_at<const void*>(storage, 0);
    storage_at_ = storage_at;
    data_at_ = data_at;
    tensor_bytes_ = is_first ? tensor_size - storage_at : std::min(tensor_bytes_, tensor_size - storage_at);
    storage_bytes_ = is_first ? storage_size - data_at : std::min(storage_bytes_, storage_size - data_at);
  }
#else
  (void)samples;
#endif
}

uint64_t TorchShim::hash(const char* tensor) const {
  constexpr uint64_t factor = 0x9E3779B97F4A7C15u;
  uint64_t lanes[4] = {1, 2, 3, 4};
  const auto add = [&lanes](const char* bytes, std::size_t size) {
    std::size_t at = 0;
    for (; at + 32 <= size; at += 32)
      for (std::size_t k = 0; k < 4; ++k) {
        const uint64_t mixed = (lanes[k] ^ word_at<uint64_t>(bytes, at + 8 * k)) * factor;
        lanes[k] = mixed ^ (mixed >> 32);
      }
    for (; at < size; at += 8) {
      const uint64_t mixed = (lanes[0] ^ word_at<uint64_t>(bytes, at)) * factor;
      lanes[0] = mixed ^ (mixed >> 32);
    }
  };
  add(tensor + storage_at_, tensor_bytes_);
  add(word_at<const char*>(tensor, storage_at_) + data_at_, storage_bytes_);
  uint64_t h = 0;
  for (const uint64_t lane : lanes) h = (h ^ lane) * factor, h ^= h >> 29;
  return h | 1;
}

uint64_t TorchShim::trace(PyObject* object, const TensorView& view) const {
  constexpr int64_t dimensions_in_object = 5;
  if (tensor_bytes_ == 0 || view.dim > dimensions_in_object) return 0;
  const char* const tensor = tensor_of(object);
  if (word_at<const void*>(tensor, 0) != tensor_class_) return 0;
  const char* const storage = word_at<const char*>(tensor, storage_at_);
  return word_at<const void*>(storage, 0) == storage_class_ ? hash(tensor) : 0;
}

bool TorchShim::is_strided(PyObject* object) const {
  if (!is_tensor(object)) return false;
  int32_t layout = 0;
  return layout_(reinterpret_cast<char*>(object) + handle_offset_, &layout) == 0 && layout == strided_;
}

bool TorchShim::look(PyObject* object, TensorView& view) const {
  if (!is_tensor(object)) return false;
  const Handle tensor = reinterpret_cast<char*>(object) + handle_offset_;
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
