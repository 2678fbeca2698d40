#include "reader.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace signadam {
namespace {

bool equal(dlpack::Device a, dlpack::Device b) { return a.type == b.type && a.id == b.id; }
bool equal(dlpack::DataType a, dlpack::DataType b) {
  return a.code == b.code && a.bits == b.bits && a.lanes == b.lanes;
}

bool same_shape(const dlpack::Tensor& tensor, const int64_t* shape) {
  for (int32_t d = 0; d < tensor.ndim; ++d)
    if (tensor.shape[d] != shape[d]) return false;
  return true;
}

// Strides of dimensions of one element, or of an empty tensor, mean nothing.
bool same_strides(const dlpack::Tensor& tensor, const int64_t* strides) {
  bool same = true;
  for (int32_t d = 0; d < tensor.ndim; ++d) {
    if (tensor.shape[d] == 0) return true;
    same = same && (tensor.shape[d] == 1 || tensor.strides[d] == strides[d]);
  }
  return same;
}

// Stands for the address of a tensor without elements: present, and never read.
char empty_storage;
void* const empty_tensor = &empty_storage;

// Interned once; compared and looked up by identity.
PyObject* name(const char* text) { return PyUnicode_InternFromString(text); }

bool is_negated(PyObject* tensor) {
  static PyObject* const method = name("is_neg");
  const auto answer = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor, method));
  if (!answer) throw py::error_already_set();
  return answer.ptr() == Py_True;
}

}  // namespace

Reader::Reader(const py::capsule& api)
    : api_(static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(api.ptr(), api.name()))) {
  if (api_ == nullptr) throw py::error_already_set();
  if (api_->header.major != dlpack::major_version)
    throw std::runtime_error("torch speaks another major version of DLPack's exchange interface");
  const auto torch = py::module_::import("torch");
  const py::object parameter = torch.attr("nn").attr("Parameter");
  const py::object grad = parameter.attr("grad");
  if (Py_TYPE(grad.ptr()) == &PyGetSetDescr_Type) {
    getter_ = reinterpret_cast<PyGetSetDescrObject*>(grad.ptr())->d_getset;
    plain_type_ = reinterpret_cast<PyTypeObject*>(parameter.ptr());
  }
}

bool Reader::view(PyObject* object, dlpack::Tensor& out) const {
  if (api_->tensor_from_py_object_no_sync(object, &out) == 0) return true;
  PyErr_Clear();
  return false;
}

Watched Reader::make_watched(const py::object& tensor) const {
  dlpack::Tensor view{};
  if (api_->tensor_from_py_object_no_sync(tensor.ptr(), &view) != 0) throw py::error_already_set();
  return {tensor, view.address(), view.device, view.dtype};
}

void Reader::watch(const py::object& param, std::size_t group, const py::tuple& strides, const py::object& grad_dtype,
                   const py::object& state) {
  // Kept for the life of the process: a static py::object would be released after the interpreter is gone.
  static const py::handle tensor_type = py::object(py::module_::import("torch").attr("Tensor")).release();
  const bool known = !grad_dtype.is_none();
  // A parameter that has never had a gradient is no kernel's business: it may be of any kind and may move.
  Watched tensor = known ? make_watched(param) : Watched{param, nullptr, {}, {}};
  Parameter parameter{std::move(tensor), nullptr, {}, group, known, {}, state, {}};
  if (known) {
    const auto dtype = grad_dtype.cast<std::pair<int, int>>();
    parameter.grad_dtype = {static_cast<uint8_t>(dtype.first), static_cast<uint8_t>(dtype.second), 1};
    dlpack::ManagedTensor* owner = nullptr;
    if (api_->managed_tensor_from_py_object_no_sync(param.ptr(), &owner) == 0)
      parameter.owner.reset(owner);
    else
      PyErr_Clear();
    dlpack::Tensor now{};
    if (!view(param.ptr(), now)) throw py::error_already_set();
    parameter.layout.assign(now.shape, now.shape + now.ndim);
    parameter.layout.insert(parameter.layout.end(), now.strides, now.strides + now.ndim);
    for (const auto& stride : strides) parameter.layout.push_back(stride.cast<int64_t>());
    if (parameter.layout.size() != 3 * static_cast<std::size_t>(now.ndim))
      throw std::invalid_argument("strides: must be one for each dimension of the parameter");
  }
  if (!state.is_none())
    for (const auto& [key, value] : state.cast<py::dict>()) {
      StateItem item{py::reinterpret_borrow<py::object>(key), py::reinterpret_borrow<py::object>(value), {}};
      // A step count is only counted up where it lies, and its storage is kept alive by the plan. Who moves one moves
      // all
      // (`for v in state.values(): v.data = ...`), so the first stands for the others.
      const bool other_step = key.equal(py::str("step")) && std::exchange(step_watched_, true);
      dlpack::Tensor ignored{};
      // What a user keeps in the state beside ours may have no address, if it is sparse for one: its identity is
      // enough.
      if (py::isinstance(value, tensor_type) && !other_step && view(value.ptr(), ignored))
        item.tensors.push_back(make_watched(item.value));
      parameter.items.push_back(std::move(item));
    }
  parameters_.push_back(std::move(parameter));
  grads_.push_back(nullptr);
}

bool Reader::unmoved(const Watched& watched) const {
  dlpack::Tensor now{};
  if (!view(watched.object.ptr(), now)) return false;
  return now.address() == watched.address && equal(now.device, watched.device) && equal(now.dtype, watched.dtype);
}

bool Reader::unmoved(Parameter& parameter) const {
  const Watched& watched = parameter.tensor;
  dlpack::Tensor now{};
  if (!view(watched.object.ptr(), now)) return false;
  parameter.param_hint = now.shape;
  return now.address() == watched.address && equal(now.device, watched.device) && equal(now.dtype, watched.dtype) &&
         3 * static_cast<std::size_t>(now.ndim) == parameter.layout.size() &&
         same_shape(now, parameter.layout.data()) && same_strides(now, parameter.layout.data() + now.ndim);
}

bool Reader::state_unmoved(const Parameter& parameter) const {
  if (parameter.state.is_none()) return true;
  if (static_cast<std::size_t>(PyDict_GET_SIZE(parameter.state.ptr())) != parameter.items.size()) return false;
  PyObject *key, *value;
  Py_ssize_t position = 0;
  for (const StateItem& item : parameter.items) {
    if (!PyDict_Next(parameter.state.ptr(), &position, &key, &value)) return false;
    if (key != item.key.ptr() || value != item.value.ptr()) return false;
    for (const Watched& tensor : item.tensors)
      if (!unmoved(tensor)) return false;
  }
  return true;
}

// Each watched state dict is the one that `state` holds. Iterating costs no hash of a tensor.
bool Reader::holds_states(const py::dict& state) const {
  const std::size_t count = parameters_.size();
  std::size_t watched = 0, held = 0, cursor = 0;
  for (const Parameter& parameter : parameters_) watched += !parameter.state.is_none();
  PyObject *key, *value;
  Py_ssize_t position = 0;
  while (PyDict_Next(state.ptr(), &position, &key, &value)) {
    // State is normally made in the order of parameters, so the search finds its place at once.
    for (std::size_t tried = 0; tried < count; ++tried) {
      const Parameter& parameter = parameters_[cursor];
      cursor = cursor + 1 == count ? 0 : cursor + 1;
      if (parameter.tensor.object.ptr() != key) continue;
      if (parameter.state.is_none()) {
        if (PyDict_Size(value) != 0) return false;
      } else {
        if (parameter.state.ptr() != value) return false;
        ++held;
      }
      break;
    }
  }
  return held == watched;
}

bool Reader::same_parameters(const py::list& param_groups) const {
  static PyObject* const params_name = name("params");
  std::size_t index = 0, group_index = 0;
  for (const auto& group : param_groups) {
    PyObject* const params = PyDict_GetItemWithError(group.ptr(), params_name);
    if (params == nullptr || !PyList_CheckExact(params)) return false;
    const Py_ssize_t size = PyList_GET_SIZE(params);
    if (index + static_cast<std::size_t>(size) > parameters_.size()) return false;
    for (Py_ssize_t i = 0; i < size; ++i) {
      const Parameter& parameter = parameters_[index++];
      if (PyList_GET_ITEM(params, i) != parameter.tensor.object.ptr() || parameter.group != group_index) return false;
    }
    ++group_index;
  }
  return index == parameters_.size();
}

bool Reader::usable(PyObject* grad, Parameter& parameter, void*& address) const {
  dlpack::Tensor now{};
  if (!view(grad, now)) return false;
  parameter.grad_object_hint = grad;
  parameter.grad_hint = now.shape;
  address = now.address();
  int64_t count = 1;
  for (int32_t d = 0; d < now.ndim; ++d) count *= now.shape[d];
  // One element can be a lazy negative: autograd takes it as it is, since no stride tells, and DLPack does not show it.
  if (count == 1 && is_negated(grad)) return false;
  return (now.data != nullptr || count == 0) && equal(now.device, parameter.tensor.device) &&
         equal(now.dtype, parameter.grad_dtype) && 3 * static_cast<std::size_t>(now.ndim) == parameter.layout.size() &&
         same_shape(now, parameter.layout.data()) && same_strides(now, parameter.layout.data() + 2 * now.ndim);
}

// param.grad, straight through torch's getter unless a subclass has one of its own.
PyObject* Reader::get_grad(PyObject* param) const {
  static PyObject* const grad_name = name("grad");
  if (Py_TYPE(param) == plain_type_) return getter_->get(param, getter_->closure);
  return PyObject_GetAttr(param, grad_name);
}

py::object Reader::read(const py::list& param_groups, const py::object& state) {
  if (!same_parameters(param_groups)) return py::none();
  if (!state.is_none()) {
    if (!holds_states(state.cast<py::dict>())) return py::none();
    for (const Parameter& parameter : parameters_)
      if (!state_unmoved(parameter)) return py::none();
  }
  // Between two steps a model has used the caches for other things. Torch's objects mostly stay where they are.
  constexpr std::size_t ahead = 6;
  py::list odd;
  computed_grads_.clear();
  for (std::size_t i = 0; i < parameters_.size(); ++i) {
    if (i + ahead < parameters_.size()) {
      const Parameter& later = parameters_[i + ahead];
      for (const void* hint : {static_cast<const void*>(later.tensor.object.ptr()), later.param_hint, later.grad_hint,
                               later.grad_object_hint})
        __builtin_prefetch(hint);
    }
    Parameter& parameter = parameters_[i];
    grads_[i] = nullptr;
    const auto grad = py::reinterpret_steal<py::object>(get_grad(parameter.tensor.object.ptr()));
    if (!grad) throw py::error_already_set();
    if (!parameter.known) {
      if (!grad.is_none()) return py::none();
      continue;
    }
    if (!unmoved(parameter)) return py::none();
    if (grad.is_none()) continue;
    if (Py_TYPE(parameter.tensor.object.ptr()) != plain_type_) computed_grads_.push_back(grad);
    void* address = nullptr;
    if (usable(grad.ptr(), parameter, address))
      grads_[i] = address != nullptr ? address : empty_tensor;
    else
      odd.append(i);
  }
  return std::move(odd);
}

std::size_t Reader::present() const {
  return static_cast<std::size_t>(std::count_if(grads_.begin(), grads_.end(), [](void* g) { return g != nullptr; }));
}

}  // namespace signadam
