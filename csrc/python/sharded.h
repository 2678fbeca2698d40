// The part of a sharded tensor (DTensor) that lies on this rank, read where the tensor's own object keeps it.
#pragma once

#include <pybind11/pybind11.h>
#include <structmember.h>

namespace signadam {

namespace py = pybind11;

// An attribute of a class: read from its slot, where it has one, and by name otherwise.
class Attribute {
 public:
  Attribute() = default;
  Attribute(PyTypeObject* type, const char* name)
      : name_(py::reinterpret_steal<py::object>(PyUnicode_InternFromString(name))) {
    PyObject* const found = _PyType_Lookup(type, name_.ptr());
    if (found == nullptr || Py_TYPE(found) != &PyMemberDescr_Type) return;
    const PyMemberDef* const member = reinterpret_cast<PyMemberDescrObject*>(found)->d_member;
    if (member->type == T_OBJECT_EX) offset_ = member->offset;
  }
  // Of an instance of that very class; null where it is not set.
  py::object of(PyObject* object) const {
    if (offset_ != 0)
      return py::reinterpret_borrow<py::object>(
          *reinterpret_cast<PyObject**>(reinterpret_cast<char*>(object) + offset_));
    PyObject* const found = PyObject_GetAttr(object, name_.ptr());
    if (found == nullptr) PyErr_Clear();
    return py::reinterpret_steal<py::object>(found);
  }

 private:
  py::object name_;
  Py_ssize_t offset_ = 0;
};

// The class of sharded tensors, as the first one that was noted has it.
class ShardedType {
 public:
  void learn(PyObject* tensor) {
    if (type_) return;
    PyTypeObject* const type = Py_TYPE(tensor);
    type_ = py::reinterpret_borrow<py::object>(reinterpret_cast<PyObject*>(type));
    part_ = Attribute(type, "_local_tensor");
    spec_ = Attribute(type, "_spec");
  }
  // Null where this is no sharded tensor.
  py::object part_of(PyObject* tensor) const { return is_one(tensor) ? part_.of(tensor) : py::object(); }
  // Whether a tensor is spread over the ranks by that very description.
  bool has_spec(PyObject* tensor, const py::object& spec) const {
    return is_one(tensor) && spec_.of(tensor).ptr() == spec.ptr();
  }

 private:
  bool is_one(PyObject* tensor) const { return type_ && reinterpret_cast<PyObject*>(Py_TYPE(tensor)) == type_.ptr(); }

  py::object type_;
  Attribute part_, spec_;
};

}  // namespace signadam
