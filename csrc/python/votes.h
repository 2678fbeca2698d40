// Votes as the module shows them.
#pragma once

#include <pybind11/pybind11.h>

namespace signadam {

void add_votes(pybind11::module_& m);

}  // namespace signadam
