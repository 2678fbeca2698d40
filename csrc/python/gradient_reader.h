// Reads, once a step, what may have changed since the plan was made: parameters, their state and gradients. In C++
// because it is the only work of a step that grows with the number of tensors.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "sharded.h"
#include "torch_shim.h"

namespace signadam {

namespace py = pybind11;

// The address of a tensor without elements: it takes part, and nothing is read there.
void* empty_tensor();

// Between two steps it owns no tensor: a step compares what groups and state hold now with what was noted when the plan
// was made. From `read` to `release` it owns all that the step uses.
class GradientReader {
 public:
  explicit GradientReader(const TorchShim* torch);

  // One per parameter, in the plan's order.
  // `param`: the tensor, or None where the plan knows no gradient and no state of it.
  // `grad_strides`: what a gradient must have to be read where it lies. `grad_like`: a tensor of its dtype.
  // `state`: (name, tensor) of each state entry that a step uses.
  // `spec`: how the parameter is spread over ranks, whose part here is what the rest describes; None: it is no DTensor.
  // `counts_there`: whether the last state entry, the number of steps, is read by the device alone, so that the plan
  // holds only as long as nobody else has written to it.
  // Throws std::invalid_argument for a tensor that torch does not describe.
  void watch(std::size_t group, const py::object& param, const py::tuple& grad_strides, const py::object& grad_like,
             const py::tuple& state, const py::object& spec, bool counts_there);

  // Reads the addresses of all gradients. Returns the indices of those that cannot be used as they are. Returns None
  // when the plan no longer holds: groups have other parameters, a tensor that the step would use is another one, has
  // moved, or has less memory than it needs, or a gradient has appeared that the plan does not know. `state`: the
  // optimizer's; None while what the step uses is not in it yet. Parameters without a gradient are not looked at.
  py::object read(const py::object& param_groups, const py::object& state);

  // Whether all that `read` has found is still so: for a step in which code of its user's has run since. Raises
  // nothing, and forgets nothing.
  bool unchanged();

  // Gives gradient `index` an address of the caller's (a copy with the right strides), which may be where the last one
  // was that could be read where it lay.
  void replace(std::size_t index, uintptr_t address) {
    grads_.at(index) = reinterpret_cast<void*>(address);
    parameters_[index].grad_address = nullptr;
    traces_of(index)[1] = {};
  }

  // The step is done, or will not be taken: nothing is owned any more.
  void release();

  const std::vector<void*>& grads() const { return grads_; }
  // Counts a write in the version of each parameter that has a gradient, and of the state entries watched, but for the
  // last, the number of steps; from `read` to `release`. `by_torch` is called with those that only torch can do it for.
  template <class Call>
  void increment_versions(Call by_torch) const {
    const auto count = [&](const Trace& trace, const py::object& tensor) {
      if (tensor && !torch_->objects().increment_version(trace)) by_torch(tensor);
    };
    for (std::size_t i = 0; i < params_.size(); ++i) {
      if (i + versions_ahead < params_.size()) __builtin_prefetch(traces_of(i + versions_ahead)[0].version, 1);
      if (grads_[i] == nullptr) continue;
      const Parameter& parameter = parameters_[i];
      const Trace* const traces = traces_of(i);
      count(traces[0], part(i));
      // A DTensor has a version beside its part's.
      if (parameter.spec && !torch_->objects().increment_version(params_[i].ptr())) by_torch(params_[i]);
      for (std::size_t k = parameter.first_entry; k + 1 < parameter.end_entry && k < state_tensors_.size(); ++k)
        count(traces[2 + k - parameter.first_entry], state_tensors_[k]);
    }
  }
  // The parameter at `index`, its gradient (or None), and the state entries named to `watch`, from `read` to `release`;
  // no state entries where `read` has not been given the state. Of a DTensor its part; of a gradient that is not
  // read where it lies, all.
  py::tuple held(std::size_t index) const;

 private:
  static constexpr int64_t unwatched = -1;
  // An addition that has to wait for memory would hold up all that follow.
  static constexpr std::size_t versions_ahead = 16;

  // A tensor as it was when the plan was made.
  struct Noted {
    void* address;
    int64_t dim, element_size, extent;  // bytes from the address to behind the last element
    int32_t dtype, device_type, device_index;
    std::size_t layout;  // index of its sizes, and then its strides, in layouts_
  };
  struct StateEntry {
    py::object name;
    Noted tensor;
    Py_ssize_t position;  // in the parameter's state, where it was last time
  };
  // What is read where a tensor is no longer as its trace has it.
  struct Expected {
    Noted param;
    std::size_t grad_layout;  // index of sizes and strides
    int64_t grad_element_size;
    int32_t grad_dtype;
  };
  // What each step reads of a parameter, beside its traces: little, for it has to come from memory.
  struct Parameter {
    py::object spec;         // null: it is no DTensor
    void* grad_address;      // of the last gradient that could be read where it lies
    uint64_t state_version;  // of its state when all entries were last found in it
    int64_t count_version;   // of its number of steps, where that is read by the device alone; otherwise `unwatched`
    std::size_t first_entry, end_entry;
    std::size_t group;
    bool known;
  };

  static void* address_of(const Parameter& parameter) {
    return parameter.grad_address != nullptr ? parameter.grad_address : empty_tensor();
  }
  // What the step works on: the parameter, or its part on this rank.
  const py::object& part(std::size_t index) const { return parameters_[index].spec ? parts_[index] : params_[index]; }
  const py::object& grad_part(std::size_t index) const {
    return parameters_[index].spec ? grad_parts_[index] : grad_objects_[index];
  }
  // When they were last found to be as noted: the parameter, the last gradient that could be read where it lies, and
  // the state entries.
  Trace* traces_of(std::size_t index) { return traces_.data() + 2 * index + parameters_[index].first_entry; }
  const Trace* traces_of(std::size_t index) const {
    return traces_.data() + 2 * index + parameters_[index].first_entry;
  }
  void take_parts();
  Noted note(const py::object& tensor);
  // Puts what may be lazily negative, which torch's interface does not tell, on `unsure_`.
  void check_later(PyObject* tensor) {
    if (!torch_->objects().shows_no_negation(tensor)) unsure_.push_back(tensor);
  }
  // Whether a tensor is as noted, and a gradient may be read where it lies: it is looked at where it has changed.
  bool same(PyObject* object, const Noted& noted, Trace& trace) {
    return torch_->follows(object, trace) || looks_same(object, noted, trace);
  }
  bool usable(PyObject* grad, std::size_t index) {
    return torch_->follows(grad, traces_of(index)[1]) || looks_usable(grad, index);
  }
  bool looks_same(PyObject* object, const Noted& noted, Trace& trace);
  bool looks_usable(PyObject* grad, std::size_t index);
  bool all_as_read();
  // The next look at each tensor asks torch.
  void forget_traces();
  bool find_parameters(const py::object& param_groups);
  bool find_states(PyObject* state);
  static PyObject* find(PyObject* own, StateEntry& entry);
  static int64_t count_version_of(PyObject* tensor, const Trace& trace);
  static uint64_t version_of(PyObject* dict);
  bool take_state(std::size_t index, PyObject* own);
  void take_gradients();
  void prefetch(std::size_t index) const;
  PyObject* get_grad(PyObject* param);

  const TorchShim* torch_;
  PyGetSetDef* getter_ = nullptr;  // of Tensor.grad
  PyObject* grad_descriptor_ = nullptr;
  // The last type met whose `grad` is that getter, and its version then, which changes with it and its bases.
  py::object plain_type_;
  unsigned int plain_version_ = 0;
  std::vector<Parameter> parameters_;
  std::vector<Trace> traces_;  // in the order in which a step looks at the tensors
  std::vector<Expected> expected_;
  std::vector<StateEntry> entries_;
  std::vector<int64_t> layouts_;
  std::vector<void*> grads_;
  // What is owned during a step, by parameter, and by state entry.
  std::vector<py::object> params_, grad_objects_, state_tensors_;
  // Of DTensors, where there are any: the parts; of gradients, null where they are spread otherwise.
  std::vector<py::object> parts_, grad_parts_;
  ShardedType sharded_;
  std::vector<PyObject*> states_;      // borrowed, while `read` runs no Python code
  std::vector<PyObject*> unsure_;      // borrowed from what is owned
  std::vector<std::size_t> index_at_;  // by position in the optimizer's state, the parameter that was there last time
};

}  // namespace signadam
