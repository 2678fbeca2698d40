// Puts a step in place. Signal handlers run Python code when a call into C++ returns, and not before: so all that a
// step writes is written by one call, and what Ctrl-C raises finds all of it done or nothing.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "gradient_reader.h"
#include "host_table.h"

namespace signadam {

namespace py = pybind11;

// A launch on the CPU that is ready to run: nothing is left that could fail.
struct CpuLaunch {
  HostTable* table;
  RuleIndex rule;
  ThresholdPass threshold_pass;
  std::vector<Scalars> scalars;
  int threads;
  ChunkStatistics* chunk_statistics;

  void run() { table->run_cpu(rule, threshold_pass, scalars, threads, chunk_statistics); }
};

// `operations`: in order, each a CpuLaunch, or a tuple of one of torch's builtin functions and its arguments.
// `tables`: those whose tensors count the step.
// `states`: (optimizer's state, parameter, the parameter's state or None, entries to put in, names to take out). What a
// group keeps of the step is such an entry as well, with the group in the place of the parameter's state.
// `written`: the parameters that are written, as a list or in a GradientReader; where their versions are not counted
// here, `increment_version`, torch's builtin, does it. `guards`: context managers of torch's that keep its builtins
// from running Python code. Throws what the first operation throws; after that nothing fails.
void commit(const py::list& operations, const py::list& tables, const py::list& states, const py::object& written,
            const py::object& increment_version, const py::list& guards);

}  // namespace signadam
