// What torch's own objects show in memory: whether a tensor is what it was, at a fraction of what asking torch costs.
// Where torch keeps what is found out from samples. Where they do not agree, nothing is known, and torch is asked.
#pragma once

#include <pybind11/pybind11.h>

#include <atomic>
#include <cstdint>
#include <cstring>

#include "object_hash.h"

namespace signadam {

namespace py = pybind11;

// What a tensor showed when torch was last asked about it.
struct Trace {
  uint64_t hash = 0;  // 0: it must be asked again
  // Where its objects lay: what to fetch ahead of the next look. They may be gone by then, and are not read.
  const char *object = nullptr, *tensor = nullptr, *storage = nullptr, *autograd = nullptr;
  // Its count of writes, for as long as `follows` says that it is as it was. Null where it has none (an inference
  // tensor), or torch must be asked.
  std::atomic<uint32_t>* version = nullptr;

  // The Python object that it is of, if that still exists; null where it must be asked again.
  PyObject* owner() const { return hash == 0 ? nullptr : reinterpret_cast<PyObject*>(const_cast<char*>(object)); }
};

class TorchObjects {
 public:
  // `samples`: plain tensors of different sizes and versions.
  // Throws std::runtime_error where torch's Python objects do not hold their tensor.
  explicit TorchObjects(const py::list& samples);

  // What has been found of them: enough for traces, for versions, for negation.
  bool recognises() const { return tensor_bytes_ != 0; }
  bool counts_versions() const { return version_at_ != 0; }
  bool knows_negation() const { return negation_at_ != 0; }

  // Where a tensor's Python object holds the one word of its at::Tensor.
  std::size_t handle_offset() const { return handle_offset_; }

  // What a tensor of `dim` dimensions shows. The hash is 0 where torch's objects are not known, it is another kind of
  // tensor, or has more dimensions than lie in its object.
  Trace trace(PyObject* tensor, int64_t dim) const;

  // Whether a tensor is as it was when it had that trace: the bytes of the object are the same, but for its reference
  // count, and so is what its storage says of its memory: address, owner and size. Which byte means what need not be
  // known.
  bool follows(PyObject* tensor, const Trace& trace) const {
    if (trace.hash == 0) return false;
    const char* const object = object_of(tensor);
    return word_at<const void*>(object, 0) == tensor_class_ &&
           word_at<const char*>(object, storage_at_) == trace.storage && hash(object) == trace.hash;
  }

  // Has the memory that `follows` will read on its way to the caches.
  void prefetch(const Trace& trace) const {
    __builtin_prefetch(trace.object);
    for (std::size_t at = 0; at < tensor_bytes_ + storage_at_; at += line) __builtin_prefetch(trace.tensor + at);
    __builtin_prefetch(trace.storage + data_at_);
    __builtin_prefetch(trace.storage + size_at_);
  }

  // The same, of what torch reads to find its gradient, and then of that gradient.
  void prefetch_gradient_of(const Trace& trace) const {
    prefetch_object(trace);
    __builtin_prefetch(trace.autograd);
    __builtin_prefetch(trace.autograd + line);
  }
  void prefetch_object(const Trace& trace) const {
    __builtin_prefetch(trace.object);
    __builtin_prefetch(trace.tensor);
    __builtin_prefetch(trace.tensor + line);
  }

  // Counts a write, of a tensor as it was when it had that trace. False where only torch's builtin can.
  bool increment_version(const Trace& trace) const {
    if (version_at_ == 0 || trace.hash == 0) return false;
    if (trace.version != nullptr) trace.version->fetch_add(1);
    return true;
  }
  // The same, of any tensor. What is none must not be given.
  bool increment_version(PyObject* tensor) const {
    if (version_at_ == 0 || !has_known_class(tensor)) return false;
    if (std::atomic<uint32_t>* const version = version_of(object_of(tensor))) version->fetch_add(1);
    return true;
  }

  // Whether a tensor certainly holds its numbers as they are, not their negatives. False where torch must be asked.
  bool shows_no_negation(PyObject* tensor) const {
    return negation_at_ != 0 && has_known_class(tensor) &&
           (word_at<uint64_t>(object_of(tensor), negation_at_) & negation_) == 0;
  }

 private:
  static constexpr std::size_t line = 64;  // of a cache

  template <class T>
  static T word_at(const char* object, std::size_t offset) {
    T word;
    std::memcpy(&word, object + offset, sizeof(word));
    return word;
  }
  bool has_known_class(PyObject* tensor) const { return word_at<const void*>(object_of(tensor), 0) == tensor_class_; }
  const char* object_of(PyObject* tensor) const {
    return word_at<const char*>(reinterpret_cast<const char*>(tensor), handle_offset_);
  }
  std::atomic<uint32_t>* version_of(const char* object) const {
    char* const version = version_at_ == 0 ? nullptr : word_at<char*>(object, version_at_);
    return version == nullptr ? nullptr : reinterpret_cast<std::atomic<uint32_t>*>(version + count_at_);
  }
  // Of an object that has a storage. Never 0.
  uint64_t hash(const char* object) const {
    const char* const storage = word_at<const char*>(object, storage_at_);
    // Between the address and the size are the owner and its deleter: another one when memory is to be copied on write.
    auto memory = word_at<uint64_t>(storage, data_at_);
    for (std::size_t at = data_at_ + 8; at < size_at_; at += 8)
      memory = (memory << 23 | memory >> 41) + word_at<uint64_t>(storage, at);
    return (ObjectHash::of(object + storage_at_, tensor_bytes_) +
            ObjectHash::of(memory, word_at<uint64_t>(storage, size_at_))) |
           1;
  }

  void find_handle(const py::list& samples);
  void find_objects(const py::list& samples);
  void find_versions(const py::list& samples);
  void find_negation(const py::list& samples);

  std::size_t handle_offset_ = 0;
  const void *tensor_class_ = nullptr, *storage_class_ = nullptr;  // of plain ones: their virtual tables
  std::size_t storage_at_ = 0, tensor_bytes_ = 0;  // where a tensor names its storage, and the bytes from there on
  std::size_t data_at_ = 0, size_at_ = 0;          // where a storage names its memory, and the size of it
  std::size_t version_at_ = 0, count_at_ = 0;      // where a tensor names its version, and that holds its count
  std::size_t negation_at_ = 0;                    // where a tensor tells, in one bit, whether it is lazily negated
  uint64_t negation_ = 0;                          // that bit
};

}  // namespace signadam
