#include "torch_objects.h"

#include <algorithm>
#include <map>
#include <stdexcept>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <malloc.h>
#endif

namespace signadam {
namespace {

// What a sample is, as Python tells it.
struct Sample {
  const char *object, *storage;
  uintptr_t address, bytes, numel;
  uint32_t version;
  static const char* object_of(const py::handle& tensor) {
    return reinterpret_cast<const char*>(tensor.attr("_cdata").cast<uintptr_t>());
  }
  explicit Sample(const py::handle& tensor) {
    const py::object own = tensor.attr("untyped_storage")();
    object = object_of(tensor);
    storage = reinterpret_cast<const char*>(own.attr("_cdata").cast<uintptr_t>());
    address = tensor.attr("data_ptr")().cast<uintptr_t>();
    bytes = own.attr("nbytes")().cast<uintptr_t>();
    numel = tensor.attr("numel")().cast<uintptr_t>();
    version = tensor.attr("_version").cast<uint32_t>();
  }
};

// Where an object holds a word; 0, which is never of interest, where it does not.
std::size_t find_word(const char* object, std::size_t size, uintptr_t wanted) {
  for (std::size_t at = 0; at + sizeof(wanted) <= size; at += sizeof(wanted))
    if (std::memcmp(object + at, &wanted, sizeof(wanted)) == 0) return at;
  return 0;
}

#if defined(__linux__)
std::size_t size_of(const char* object) { return malloc_usable_size(const_cast<char*>(object)); }
#else
std::size_t size_of(const char*) { return 0; }
#endif

}  // namespace

TorchObjects::TorchObjects(const py::list& samples) {
  find_handle(samples);
  find_objects(samples);
  if (tensor_bytes_ == 0) return;
  find_versions(samples);
  find_negation(samples);
}

void TorchObjects::find_handle(const py::list& samples) {
  for (const auto& sample : samples) {
    const auto wanted = sample.attr("_cdata").cast<uintptr_t>();
    const auto size = static_cast<std::size_t>(Py_TYPE(sample.ptr())->tp_basicsize);
    const std::size_t found = find_word(reinterpret_cast<const char*>(sample.ptr()), size, wanted);
    if (found == 0 || (handle_offset_ != 0 && handle_offset_ != found))
      throw std::runtime_error("torch's tensor objects are unknown");
    handle_offset_ = found;
  }
  if (handle_offset_ == 0) throw std::runtime_error("no sample tensors");
}

void TorchObjects::find_objects(const py::list& samples) {
  std::size_t least = ObjectHash::most_bytes;
  for (const auto& tensor : samples) {
    const Sample sample(tensor);
    const std::size_t size = size_of(sample.object), storage_size = size_of(sample.storage);
    const std::size_t storage_at = find_word(sample.object, size, reinterpret_cast<uintptr_t>(sample.storage));
    const std::size_t data_at = find_word(sample.storage, storage_size, sample.address);
    const std::size_t size_at = find_word(sample.storage, storage_size, sample.bytes);
    if (storage_at == 0 || data_at == 0 || size_at <= data_at) return;
    const void* const tensor_class = word_at<const void*>(sample.object, 0);
    const void* const storage_class = word_at<const void*>(sample.storage, 0);
    if (tensor_class_ == nullptr) {
      tensor_class_ = tensor_class;
      storage_class_ = storage_class;
      storage_at_ = storage_at;
      data_at_ = data_at;
      size_at_ = size_at;
    }
    if (storage_at != storage_at_ || data_at != data_at_ || size_at != size_at_ || tensor_class != tensor_class_ ||
        storage_class != storage_class_)
      return;
    // malloc may give a little more than was asked for: the least of some is the size.
    least = std::min(least, size - storage_at);
  }
  if (least >= ObjectHash::block) tensor_bytes_ = least;
}

// A tensor shares its version with what `detach` makes of it, and with none of the other samples.
void TorchObjects::find_versions(const py::list& samples) {
  std::vector<std::size_t> places, counts;
  for (std::size_t at = storage_at_ + sizeof(void*); at + sizeof(void*) <= storage_at_ + tensor_bytes_;
       at += sizeof(void*))
    places.push_back(at);
  std::vector<Sample> known;
  for (const auto& tensor : samples) {
    const Sample sample(tensor);
    const py::object twin = tensor.attr("detach")();
    const Sample detached(twin);
    const auto is_other = [&](std::size_t at) {
      const auto word = word_at<uintptr_t>(sample.object, at);
      return word == sample.numel || word != word_at<uintptr_t>(detached.object, at) ||
             std::any_of(known.begin(), known.end(),
                         [&](const Sample& other) { return word == word_at<uintptr_t>(other.object, at); });
    };
    places.erase(std::remove_if(places.begin(), places.end(), is_other), places.end());
    known.push_back(sample);
  }
  if (places.size() != 1) return;
  const auto held_by = [&](const Sample& sample) { return word_at<char*>(sample.object, places[0]); };
  for (const Sample& sample : known) {
    const std::size_t size = size_of(held_by(sample));
    if (&sample == &known.front())
      for (std::size_t at = 0; at + sizeof(uint32_t) <= size; at += sizeof(uint32_t)) counts.push_back(at);
    const auto is_other = [&](std::size_t at) {
      return at + sizeof(uint32_t) > size || word_at<uint32_t>(held_by(sample), at) != sample.version;
    };
    counts.erase(std::remove_if(counts.begin(), counts.end(), is_other), counts.end());
  }
  if (counts.size() != 1) return;
  version_at_ = places[0];
  count_at_ = counts[0];
  // What has been found is tried.
  for (const auto& tensor : samples) {
    const Sample sample(tensor);
    version_of(sample.object)->fetch_add(1);
    if (Sample(tensor).version != sample.version + 1) {
      version_at_ = 0;
      return;
    }
  }
}

// Of two views of a sample, one of them lazily negated, one word differs by one bit, the same for all samples. Of two
// that are not negated it is the same, unlike addresses; all views stay, so that no address comes twice.
void TorchObjects::find_negation(const py::list& samples) {
  const py::object negated_view = py::module_::import("torch").attr("_neg_view");
  std::vector<py::object> views;
  std::map<std::size_t, uint64_t> bits;  // by place
  for (const auto& tensor : samples) {
    const py::object one = tensor.attr("detach")(), other = tensor.attr("detach")(), negated = negated_view(one);
    const bool is_first = views.empty();
    views.insert(views.end(), {one, other, negated});
    std::map<std::size_t, uint64_t> found;
    for (std::size_t at = storage_at_; at + sizeof(uint64_t) <= storage_at_ + tensor_bytes_; at += sizeof(uint64_t)) {
      const auto word = [at](const py::object& view) { return word_at<uint64_t>(Sample::object_of(view), at); };
      const uint64_t difference = word(one) ^ word(negated);
      const bool is_one_bit = difference != 0 && (difference & (difference - 1)) == 0;
      if (is_one_bit && word(one) == word(other) && (is_first || (bits.count(at) != 0 && bits.at(at) == difference)))
        found[at] = difference;
    }
    bits = std::move(found);
  }
  if (bits.size() != 1) return;
  negation_at_ = bits.begin()->first;
  negation_ = bits.begin()->second;
}

Trace TorchObjects::trace(PyObject* tensor, int64_t dim) const {
  constexpr int64_t dimensions_in_object = 5;
  if (tensor_bytes_ == 0 || dim > dimensions_in_object) return {};
  const char* const object = object_of(tensor);
  if (word_at<const void*>(object, 0) != tensor_class_) return {};
  const char* const storage = word_at<const char*>(object, storage_at_);
  // torch.func leaves objects without one.
  if (storage == nullptr || word_at<const void*>(storage, 0) != storage_class_) return {};
  // Behind its storage a tensor names what autograd keeps of it. If it did not, another line would be fetched ahead.
  const auto* const autograd = word_at<const char*>(object, storage_at_ + sizeof(storage));
  return {hash(object), reinterpret_cast<const char*>(tensor), object, storage, autograd, version_of(object)};
}

}  // namespace signadam
