#include "commit.h"

#include <optional>

namespace signadam {
namespace {

class Guards {
 public:
  explicit Guards(const py::list& guards) {
    for (const auto& guard : guards) {
      guard.attr("__enter__")();
      entered_.push_back(py::reinterpret_borrow<py::object>(guard));
    }
  }
  ~Guards() {
    for (; !entered_.empty(); entered_.pop_back()) {
      PyObject* const left = PyObject_CallMethod(entered_.back().ptr(), "__exit__", "OOO", Py_None, Py_None, Py_None);
      if (left == nullptr) PyErr_Clear();
      Py_XDECREF(left);
    }
  }
  Guards(const Guards&) = delete;
  Guards& operator=(const Guards&) = delete;

 private:
  std::vector<py::object> entered_;
};

// Hashing a tensor runs Python code, in which a signal handler may raise. What it raises is kept for later, and the
// work is done again.
class Insistent {
 public:
  template <class Operation>
  void operator()(Operation operation) {
    constexpr int attempts = 1000;
    for (int i = 0; i < attempts && operation() != 0; ++i) {
      py::error_already_set error;
      if (!first_) first_.emplace(std::move(error));
    }
  }
  void rethrow() {
    if (first_) throw py::error_already_set(std::move(*first_));
  }

 private:
  std::optional<py::error_already_set> first_;
};

void put(PyObject* dict, PyObject* key, PyObject* value, Insistent& insist) {
  // A subclass may keep more than a dict does.
  if (PyDict_CheckExact(dict))
    insist([&] { return PyDict_SetItem(dict, key, value); });
  else
    insist([&] { return PyObject_SetItem(dict, key, value); });
}

void put_state(const py::tuple& entry, Insistent& insist) {
  const py::object state = entry[0], param = entry[1], own = entry[2], added = entry[3];
  if (own.is_none()) {
    put(state.ptr(), param.ptr(), added.ptr(), insist);
    return;
  }
  PyObject *key, *value;
  Py_ssize_t position = 0;
  while (PyDict_Next(added.ptr(), &position, &key, &value)) put(own.ptr(), key, value, insist);
  for (const auto& name : entry[4].cast<py::tuple>())
    if (PyMapping_HasKey(own.ptr(), name.ptr()) == 1) insist([&] { return PyObject_DelItem(own.ptr(), name.ptr()); });
}

void count(const py::list& written, const py::object& increment_version) {
  const auto increment = [&](const py::list& tensors) {
    const auto done = py::reinterpret_steal<py::object>(
        PyObject_CallFunctionObjArgs(increment_version.ptr(), tensors.ptr(), nullptr));
    PyErr_Clear();
    return static_cast<bool>(done);
  };
  if (written.empty() || increment(written)) return;
  // Inference tensors have no version, and end a call that has one. Who is counted twice has been written.
  for (const auto& tensor : written) {
    py::list one;
    one.append(tensor);
    increment(one);
  }
}

}  // namespace

void commit(const py::list& operations, const py::list& tables, const py::list& states, const py::object& written,
            const py::object& increment_version, const py::list& guards) {
  const Guards guarded(guards);
  for (const auto& operation : operations) {
    if (py::isinstance<CpuLaunch>(operation)) {
      auto& launch = operation.cast<CpuLaunch&>();
      py::gil_scoped_release release;
      launch.run();
    } else {
      const auto call = operation.cast<py::tuple>();
      const py::object function = call[0];
      const auto arguments =
          py::reinterpret_steal<py::object>(PyTuple_GetSlice(call.ptr(), 1, PyTuple_GET_SIZE(call.ptr())));
      const auto result = py::reinterpret_steal<py::object>(PyObject_CallObject(function.ptr(), arguments.ptr()));
      if (!result) throw py::error_already_set();
    }
  }
  for (const auto& table : tables) table.cast<HostTable&>().commit();
  Insistent insist;
  for (const auto& state : states) put_state(state.cast<py::tuple>(), insist);
  // Raw writes go unnoticed by autograd until the version counters say so.
  py::list uncounted;
  if (py::isinstance<GradientReader>(written))
    written.cast<const GradientReader&>().increment_versions(
        [&](const py::object& tensor) { uncounted.append(tensor); });
  else
    uncounted = written.cast<py::list>();
  count(uncounted, increment_version);
  insist.rethrow();
}

}  // namespace signadam
