// Reads, once a step, what may have moved since the plan was made: parameters, state and gradients. In C++ because it
// is the only work of a step that grows with the number of tensors.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <vector>

#include "dlpack.h"

namespace signadam {

namespace py = pybind11;

// A tensor as it was when the plan was made.
struct Watched {
  py::object object;
  void* address;
  dlpack::Device device;
  dlpack::DataType dtype;
};

class Reader {
 public:
  // `api`: torch.Tensor.__dlpack_c_exchange_api__.
  explicit Reader(const py::capsule& api);

  // One per parameter, in the plan's order. `strides`: what a gradient must have to be read where it lies.
  // `grad_dtype`: (code, bits) of DLPack, or None when the plan knows no gradient of this parameter. `state`: the
  // parameter's state dict or None.
  void watch(const py::object& param, std::size_t group, const py::tuple& strides, const py::object& grad_dtype,
             const py::object& state);

  // Reads the addresses of all gradients. Returns the indices of those that cannot be used as they are. Returns None
  // when the plan no longer holds: groups have other parameters, a watched tensor has moved, a gradient has appeared
  // that the plan does not know. `state` is None when nobody else can have touched it; otherwise it is looked through.
  py::object read(const py::list& param_groups, const py::object& state);

  // Gives gradient `index` an address of the caller's (a copy with the right strides).
  void replace(std::size_t index, uintptr_t address) { grads_.at(index) = reinterpret_cast<void*>(address); }

  // The step is done: what was kept alive for it may go.
  void release() { computed_grads_.clear(); }

  const std::vector<void*>& grads() const { return grads_; }
  std::size_t present() const;

 private:
  struct StateItem {
    py::object key, value;
    std::vector<Watched> tensors;  // the value itself, if it is a tensor
  };
  struct Release {
    void operator()(dlpack::ManagedTensor* owner) const { owner->deleter(owner); }
  };
  struct Parameter {
    Watched tensor;
    // A second owner of torch's tensor. Where there is only the Python object, each look at the tensor from C++ makes
    // torch take and drop that object, which costs as much as the look itself.
    std::unique_ptr<dlpack::ManagedTensor, Release> owner;
    std::vector<int64_t> layout;  // shape, strides, strides of a gradient that is read where it lies
    std::size_t group;
    bool known;
    dlpack::DataType grad_dtype;
    py::object state;
    std::vector<StateItem> items;
    // Where torch kept the shapes of parameter and gradient last time, and the gradient's object: what to fetch ahead.
    const void *param_hint = nullptr, *grad_hint = nullptr, *grad_object_hint = nullptr;
  };

  bool view(PyObject* object, dlpack::Tensor& out) const;
  bool unmoved(const Watched& watched) const;
  bool unmoved(Parameter& parameter) const;
  bool same_parameters(const py::list& param_groups) const;
  bool state_unmoved(const Parameter& parameter) const;
  bool holds_states(const py::dict& state) const;
  bool usable(PyObject* grad, Parameter& parameter, void*& address) const;
  PyObject* get_grad(PyObject* param) const;
  Watched make_watched(const py::object& tensor) const;

  const dlpack::ExchangeApi* api_;
  PyTypeObject* plain_type_ = nullptr;  // objects of exactly this type have the getter below
  PyGetSetDef* getter_ = nullptr;
  std::vector<Parameter> parameters_;
  std::vector<void*> grads_;
  std::vector<py::object> computed_grads_;  // of subclasses that may make a gradient when asked, and keep none
  bool step_watched_ = false;
};

}  // namespace signadam
