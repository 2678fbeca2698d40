#include "gradient_reader.h"

#include <stdexcept>
#include <unordered_set>
#include <utility>

namespace signadam {
namespace {

// Memory below is never a process's own; an address there is an offset into a storage that was freed.
constexpr uintptr_t first_page = 4096;

bool same_sizes(const TensorView& now, const int64_t* sizes) { return std::equal(sizes, sizes + now.dim, now.sizes); }

// Strides of dimensions of one element, or of an empty tensor, mean nothing.
bool same_strides(const TensorView& now, const int64_t* strides) {
  bool same = true;
  for (int64_t d = 0; d < now.dim; ++d) {
    if (now.sizes[d] == 0) return true;
    same = same && (now.sizes[d] == 1 || now.strides[d] == strides[d]);
  }
  return same;
}

// Elements from the first to behind the last in memory; 0 without elements.
int64_t reach(const TensorView& view) {
  int64_t last = 0;
  for (int64_t d = 0; d < view.dim; ++d) {
    if (view.sizes[d] == 0) return 0;
    last += (view.sizes[d] - 1) * view.strides[d];
  }
  return last + 1;
}

// Whether the storage has memory, and holds all bytes up to `extent` behind the address.
bool covered(const TensorView& view, int64_t offset_bytes, int64_t extent) {
  if (extent == 0) return true;
  return reinterpret_cast<uintptr_t>(view.address) >= first_page + static_cast<uintptr_t>(offset_bytes) &&
         offset_bytes + extent <= view.storage_bytes;
}

// Interned once; compared and looked up by identity.
PyObject* name(const char* text) { return PyUnicode_InternFromString(text); }

bool is_negated(PyObject* tensor) {
  static PyObject* const method = name("is_neg");
  const auto answer = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor, method));
  if (!answer) throw py::error_already_set();
  return answer.ptr() == Py_True;
}

char empty_storage;

// A tensor that goes may run Python code of its user's, which must not meet half a list.
void drop(std::vector<py::object>& tensors) {
  constexpr std::size_t next = 16;
  auto dropped = std::exchange(tensors, {});
  for (std::size_t i = 0; i < dropped.size(); ++i) {
    if (i + next < dropped.size()) __builtin_prefetch(dropped[i + next].ptr(), 1);
    dropped[i] = {};
  }
  dropped.clear();
  if (tensors.empty()) tensors.swap(dropped);  // keeps the room
}

// Parameters between the one that is looked at and the one whose objects are fetched.
constexpr std::size_t ahead = 8;
constexpr Py_ssize_t next = 16;

}  // namespace

void* empty_tensor() { return &empty_storage; }

GradientReader::GradientReader(const TorchShim* torch) : torch_(torch) {
  const py::object grad = py::module_::import("torch").attr("Tensor").attr("grad");
  if (Py_TYPE(grad.ptr()) == &PyGetSetDescr_Type) {
    grad_descriptor_ = grad.ptr();  // lives as long as torch
    getter_ = reinterpret_cast<PyGetSetDescrObject*>(grad.ptr())->d_getset;
  }
}

GradientReader::Noted GradientReader::note(const py::object& tensor) {
  TensorView view;
  if (!torch_->look(tensor.ptr(), view)) throw std::invalid_argument("torch does not describe this tensor");
  const auto element_size = tensor.attr("element_size")().cast<int64_t>();
  const std::size_t layout = layouts_.size();
  layouts_.insert(layouts_.end(), view.sizes, view.sizes + view.dim);
  layouts_.insert(layouts_.end(), view.strides, view.strides + view.dim);
  return {view.address, view.dim,         element_size,      reach(view) * element_size,
          view.dtype,   view.device_type, view.device_index, layout};
}

void GradientReader::watch(std::size_t group, const py::object& param, const py::tuple& grad_strides,
                           const py::object& grad_like, const py::tuple& state, const py::object& spec,
                           bool counts_there) {
  Parameter parameter{};
  Expected expected{};
  parameter.group = group;
  parameter.known = !param.is_none();
  parameter.count_version = unwatched;
  parameter.first_entry = entries_.size();
  if (parameter.known) {
    py::object own = param;
    if (!spec.is_none()) {
      sharded_.learn(param.ptr());
      parameter.spec = spec;
      own = sharded_.part_of(param.ptr());
      if (!own) throw std::invalid_argument("a sharded parameter of another class than the first, or without its part");
    }
    expected.param = note(own);
    TensorView like;
    if (!torch_->look(grad_like.ptr(), like)) throw std::invalid_argument("torch does not describe this tensor");
    expected.grad_dtype = like.dtype;
    expected.grad_element_size = grad_like.attr("element_size")().cast<int64_t>();
    if (static_cast<int64_t>(grad_strides.size()) != expected.param.dim)
      throw std::invalid_argument("grad_strides: must be one for each dimension of the parameter");
    expected.grad_layout = layouts_.size();
    for (int64_t d = 0; d < expected.param.dim; ++d)
      layouts_.push_back(layouts_[expected.param.layout + static_cast<std::size_t>(d)]);
    for (const auto& stride : grad_strides) layouts_.push_back(stride.cast<int64_t>());
    for (const auto& entry : state) {
      const auto pair = entry.cast<py::tuple>();
      py::object entry_name = pair[0];
      PyObject* interned = entry_name.release().ptr();
      PyUnicode_InternInPlace(&interned);
      entries_.push_back({py::reinterpret_steal<py::object>(interned), note(pair[1]), 0});
    }
    if (counts_there && state.size() != 0) {
      const auto last = state[state.size() - 1].cast<py::tuple>();
      parameter.count_version = count_version_of(last[1].cast<py::object>().ptr(), {});
    }
  }
  parameter.end_entry = entries_.size();
  parameters_.push_back(parameter);
  expected_.push_back(expected);
  traces_.resize(2 * parameters_.size() + entries_.size());
  grads_.push_back(nullptr);
}

bool GradientReader::looks_same(PyObject* object, const Noted& noted, Trace& trace) {
  TensorView now;
  const bool is_same = torch_->look(object, now) && now.address == noted.address && now.dtype == noted.dtype &&
                       now.device_type == noted.device_type && now.device_index == noted.device_index &&
                       now.dim == noted.dim && same_sizes(now, layouts_.data() + noted.layout) &&
                       same_strides(now, layouts_.data() + noted.layout + noted.dim) &&
                       covered(now, now.storage_offset * noted.element_size, noted.extent);
  if (is_same) {
    trace = torch_->objects().trace(object, now.dim);
    check_later(object);
  }
  return is_same;
}

bool GradientReader::looks_usable(PyObject* grad, std::size_t index) {
  const Expected& expected = expected_[index];
  TensorView now;
  if (!torch_->is_strided(grad) || !torch_->look(grad, now)) return false;
  if (now.dtype != expected.grad_dtype || now.device_type != expected.param.device_type ||
      now.device_index != expected.param.device_index || now.dim != expected.param.dim ||
      !same_sizes(now, layouts_.data() + expected.grad_layout) ||
      !same_strides(now, layouts_.data() + expected.grad_layout + now.dim) ||
      !covered(now, now.storage_offset * expected.grad_element_size, reach(now) * expected.grad_element_size))
    return false;
  // Only a CPU reads at an address that is no multiple of the element's size.
  if (now.device_type != torch_->cpu() &&
      reinterpret_cast<uintptr_t>(now.address) % static_cast<uintptr_t>(expected.grad_element_size) != 0)
    return false;
  traces_of(index)[1] = torch_->objects().trace(grad, now.dim);
  parameters_[index].grad_address = now.address;
  check_later(grad);
  return true;
}

// param.grad, straight through torch's getter unless a subclass has one of its own. A new reference, or null.
PyObject* GradientReader::get_grad(PyObject* param) {
  static PyObject* const grad_name = name("grad");
  PyTypeObject* const type = Py_TYPE(param);
  if (reinterpret_cast<PyObject*>(type) != plain_type_.ptr() || type->tp_version_tag != plain_version_) {
    if (grad_descriptor_ == nullptr || _PyType_Lookup(type, grad_name) != grad_descriptor_)
      return PyObject_GetAttr(param, grad_name);
    plain_type_ = py::reinterpret_borrow<py::object>(reinterpret_cast<PyObject*>(type));
    plain_version_ = type->tp_version_tag;  // 0 where the type has none: looked up each time
  }
  return getter_->get(param, getter_->closure);
}

// Takes the parameters that groups hold now; false where they are not as many, or not in the groups that were noted.
bool GradientReader::find_parameters(const py::object& param_groups) {
  static PyObject* const params_name = name("params");
  std::size_t index = 0, group_index = 0;
  const auto groups = py::reinterpret_steal<py::object>(PySequence_Fast(param_groups.ptr(), "param_groups"));
  if (!groups) throw py::error_already_set();
  params_.resize(parameters_.size());
  for (Py_ssize_t k = 0; k < PySequence_Fast_GET_SIZE(groups.ptr()); ++k, ++group_index) {
    const auto given =
        py::reinterpret_steal<py::object>(PyObject_GetItem(PySequence_Fast_GET_ITEM(groups.ptr(), k), params_name));
    if (!given) throw py::error_already_set();
    const auto params = py::reinterpret_steal<py::object>(PySequence_Fast(given.ptr(), "params"));
    if (!params) throw py::error_already_set();
    const Py_ssize_t size = PySequence_Fast_GET_SIZE(params.ptr());
    if (index + static_cast<std::size_t>(size) > parameters_.size()) return false;
    PyObject* const* const items = PySequence_Fast_ITEMS(params.ptr());
    for (Py_ssize_t i = 0; i < size; ++i, ++index) {
      if (i + next < size) __builtin_prefetch(items[i + next], 1);
      if (parameters_[index].group != group_index) return false;
      params_[index] = py::reinterpret_borrow<py::object>(items[i]);
    }
  }
  return index == parameters_.size();
}

// Finds each parameter's state without hashing a tensor, which would run Python code.
bool GradientReader::find_states(PyObject* state) {
  if (!PyDict_Check(state)) return false;
  states_.assign(parameters_.size(), nullptr);
  const std::size_t count = parameters_.size();
  std::size_t place = 0, cursor = 0;
  PyObject *key, *value;
  Py_ssize_t position = 0;
  for (; PyDict_Next(state, &position, &key, &value); ++place) {
    if (place == index_at_.size()) index_at_.push_back(cursor);
    std::size_t index = index_at_[place];
    if (index >= count || params_[index].ptr() != key) {
      // State is normally made in the order of parameters, so the search finds its place at once.
      std::size_t tried = 0;
      for (; tried < count && params_[cursor].ptr() != key; ++tried) cursor = cursor + 1 == count ? 0 : cursor + 1;
      if (tried == count) continue;  // a parameter of no group
      index_at_[place] = index = cursor;
    }
    cursor = index + 1 == count ? 0 : index + 1;
    states_[index] = value;
  }
  return true;
}

// The entry of that name, or null; its position is noted where the key is the same object.
PyObject* GradientReader::find(PyObject* own, StateEntry& entry) {
  PyObject *key, *value;
  Py_ssize_t position = 0;
  for (Py_ssize_t before = 0; PyDict_Next(own, &position, &key, &value) != 0; before = position)
    if (key == entry.name.ptr()) {
      entry.position = before;
      return value;
    }
  value = PyDict_GetItemWithError(own, entry.name.ptr());
  if (value == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
  return value;
}

// A number that no other dictionary has had, and this one only for as long as it has not changed; 0 where Python does
// not tell.
uint64_t GradientReader::version_of(PyObject* dict) {
#if PY_VERSION_HEX < 0x030C0000
  return reinterpret_cast<PyDictObject*>(dict)->ma_version_tag;
#else
  (void)dict;
  return 0;
#endif
}

// How often torch has written to a tensor: the device's own counting is no such write.
int64_t GradientReader::count_version_of(PyObject* tensor, const Trace& trace) {
  if (trace.version != nullptr) return static_cast<int64_t>(trace.version->load());
  static PyObject* const version_name = name("_version");
  const auto version = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor, version_name));
  if (!version) throw py::error_already_set();
  return version.cast<int64_t>();
}

// Whether a parameter's state is as it was noted; from here on it is owned.
bool GradientReader::take_state(std::size_t index, PyObject* own) {
  Parameter& parameter = parameters_[index];
  if (parameter.first_entry == parameter.end_entry) return true;
  if (own == nullptr || !PyDict_Check(own)) return false;
  const uint64_t version = version_of(own);
  const bool is_known = version != 0 && version == parameter.state_version;
  const std::size_t end = parameter.end_entry;
  Trace* trace = traces_of(index) + 2;
  for (std::size_t e = parameter.first_entry; e < end; ++e, ++trace) {
    PyObject* value = is_known ? trace->owner() : nullptr;
    if (value == nullptr) {
      StateEntry& entry = entries_[e];
      PyObject* key = nullptr;
      Py_ssize_t position = entry.position;
      // Mostly it is where it was; a position that no longer exists is noticed.
      if (PyDict_Next(own, &position, &key, &value) == 0 || key != entry.name.ptr()) {
        value = find(own, entry);
        if (value == nullptr) return false;
      }
    }
    if (!same(value, entries_[e].tensor, *trace)) return false;
    state_tensors_[e] = py::reinterpret_borrow<py::object>(value);
  }
  if (parameter.count_version != unwatched &&
      count_version_of(state_tensors_[end - 1].ptr(), trace[-1]) != parameter.count_version)
    return false;
  parameter.state_version = version;
  return true;
}

void GradientReader::take_gradients() {
  grad_objects_.resize(parameters_.size());
  for (std::size_t i = 0; i < parameters_.size(); ++i) {
    if (i + ahead < parameters_.size()) {
      const Trace* const traces = traces_of(i + ahead);
      torch_->objects().prefetch_gradient_of(traces[0]);
      torch_->objects().prefetch_object(traces[1]);
    }
    PyObject* const grad = get_grad(params_[i].ptr());
    if (grad == nullptr) throw py::error_already_set();
    if (grad == Py_None)
      Py_DECREF(grad);
    else
      grad_objects_[i] = py::reinterpret_steal<py::object>(grad);
  }
}

// The parts of DTensors and of their gradients; runs no Python code where both are in slots.
void GradientReader::take_parts() {
  for (std::size_t i = 0; i < parameters_.size(); ++i) {
    const py::object& spec = parameters_[i].spec;
    if (!spec || !grad_objects_[i]) continue;
    if (parts_.empty()) {
      parts_.resize(parameters_.size());
      grad_parts_.resize(parameters_.size());
    }
    parts_[i] = sharded_.part_of(params_[i].ptr());
    PyObject* const grad = grad_objects_[i].ptr();
    if (sharded_.has_spec(grad, spec)) grad_parts_[i] = sharded_.part_of(grad);
  }
}

// What the loop of `read` will look at: most of its time would be spent waiting for it.
void GradientReader::prefetch(std::size_t index) const {
  if (!states_.empty()) __builtin_prefetch(states_[index]);
  const Trace* trace = traces_of(index);
  const Trace* const end = trace + 2 + parameters_[index].end_entry - parameters_[index].first_entry;
  for (; trace < end; ++trace) torch_->objects().prefetch(*trace);
}

py::object GradientReader::read(const py::object& param_groups, const py::object& state) {
  release();
  unsure_.clear();
  std::fill(grads_.begin(), grads_.end(), nullptr);
  if (!find_parameters(param_groups)) return py::none();
  take_gradients();  // which may run Python code; what follows does not, up to the last loop
  take_parts();
  const bool has_state = !state.is_none();
  if (has_state) {
    if (!find_states(state.ptr())) return py::none();
    state_tensors_.resize(entries_.size());
  }
  std::vector<std::size_t> needs_copy;
  for (std::size_t i = 0; i < parameters_.size(); ++i) {
    if (i + ahead < parameters_.size()) prefetch(i + ahead);
    if (!grad_objects_[i]) continue;
    const Parameter& parameter = parameters_[i];
    if (!parameter.known || !part(i) || !same(part(i).ptr(), expected_[i].param, traces_of(i)[0])) return py::none();
    if (has_state && !take_state(i, states_[i])) return py::none();
    if (!grad_part(i) || !usable(grad_part(i).ptr(), i)) {
      needs_copy.push_back(i);
      continue;
    }
    grads_[i] = address_of(parameter);
  }
  std::unordered_set<PyObject*> negated;
  try {
    for (PyObject* object : std::exchange(unsure_, {}))  // which may run Python code
      if (is_negated(object)) negated.insert(object);
  } catch (py::error_already_set&) {
    forget_traces();
    throw;
  }
  const auto is_any = [&negated](const py::object& tensor) { return negated.count(tensor.ptr()) != 0; };
  if (!negated.empty()) {
    for (const auto* tensors : {&params_, &parts_, &state_tensors_})
      if (std::any_of(tensors->begin(), tensors->end(), is_any)) return py::none();
    for (std::size_t i = 0; i < parameters_.size(); ++i)
      if (grads_[i] != nullptr && is_any(grad_part(i))) {
        traces_of(i)[1] = {};
        grads_[i] = nullptr;
        needs_copy.push_back(i);
      }
  }
  py::list indices;
  for (const std::size_t i : needs_copy) indices.append(i);
  return std::move(indices);
}

bool GradientReader::unchanged() {
  const bool is_unchanged = all_as_read();
  bool negates = false;
  try {
    for (PyObject* object : std::exchange(unsure_, {})) negates = negates || is_negated(object);
  } catch (py::error_already_set&) {
    negates = true;
  }
  // Traces stand for tensors that are not negated: what was seen on the way is asked again.
  if (!is_unchanged || negates) forget_traces();
  return is_unchanged && !negates;
}

void GradientReader::forget_traces() { std::fill(traces_.begin(), traces_.end(), Trace{}); }

bool GradientReader::all_as_read() {
  for (std::size_t i = 0; i < params_.size(); ++i) {
    if (!grad_objects_[i]) continue;
    const Parameter& parameter = parameters_[i];
    Trace* const traces = traces_of(i);
    // A gradient that has been copied, or that the step is taken without, is not read.
    const bool is_read = grads_[i] != nullptr && grads_[i] == address_of(parameter);
    if (!same(part(i).ptr(), expected_[i].param, traces[0]) ||
        (is_read && grad_part(i) && !(usable(grad_part(i).ptr(), i) && grads_[i] == address_of(parameter))))
      return false;
    for (std::size_t e = parameter.first_entry; e < parameter.end_entry && e < state_tensors_.size(); ++e)
      if (!same(state_tensors_[e].ptr(), entries_[e].tensor, traces[2 + e - parameter.first_entry])) return false;
  }
  return true;
}

void GradientReader::release() {
  drop(params_);
  drop(grad_objects_);
  drop(parts_);
  drop(grad_parts_);
  drop(state_tensors_);
}

py::tuple GradientReader::held(std::size_t index) const {
  const Parameter& parameter = parameters_.at(index);
  py::list held;
  const bool has_grad = index < grad_objects_.size() && grad_objects_[index];
  held.append(has_grad && part(index) ? part(index) : params_.at(index));
  const bool is_read = grads_.at(index) != nullptr;
  held.append(!has_grad ? py::none() : is_read && grad_part(index) ? grad_part(index) : grad_objects_[index]);
  for (std::size_t e = parameter.first_entry; e < parameter.end_entry && e < state_tensors_.size(); ++e)
    held.append(state_tensors_[e] ? state_tensors_[e] : py::none());
  return py::tuple(held);
}

}  // namespace signadam
