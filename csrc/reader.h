// Reads, once a step, what may have moved since the plan was made: parameters, state and gradients. In C++ because it
// is the only work of a step that grows with the number of tensors.
#pragma once

#include <pybind11/pybind11.h>

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
  void watch(const py::object& param, const py::tuple& strides, const py::object& grad_dtype, const py::object& state);

  // True while groups hold the watched parameters in order and every watched tensor is where it was. `state` is None
  // when nobody else can have touched it; otherwise it is looked through as well.
  bool unmoved(const py::list& param_groups, const py::object& state) const;

  // Reads the addresses of all gradients. Returns the indices of those that cannot be used as they are; None when one
  // has appeared that the plan does not know.
  py::object read();

  // Gives gradient `index` an address of the caller's (a copy with the right strides).
  void replace(std::size_t index, uintptr_t address) { grads_.at(index) = reinterpret_cast<void*>(address); }

  const std::vector<void*>& grads() const { return grads_; }
  std::size_t present() const;

 private:
  struct StateItem {
    py::object key, value;
    std::vector<Watched> tensors;  // the value itself, if it is a tensor
  };
  struct Parameter {
    Watched tensor;
    std::vector<int64_t> layout;  // shape, strides, strides of a gradient that is read where it lies
    bool known;
    dlpack::DataType grad_dtype;
    py::object state;
    std::vector<StateItem> items;
  };

  bool view(PyObject* object, dlpack::Tensor& out) const;
  bool unmoved(const Watched& watched) const;
  bool param_unmoved(const Parameter& parameter) const;
  bool state_unmoved(const Parameter& parameter) const;
  bool holds_states(const py::dict& state) const;
  bool usable(PyObject* grad, const Parameter& parameter, void*& address) const;
  PyObject* get_grad(PyObject* param) const;
  Watched make_watched(const py::object& tensor) const;

  const dlpack::ExchangeApi* api_;
  PyTypeObject* plain_type_ = nullptr;  // objects of exactly this type have the getter below
  PyGetSetDef* getter_ = nullptr;
  std::vector<Parameter> parameters_;
  std::vector<void*> grads_;
  bool step_watched_ = false;
};

}  // namespace signadam
