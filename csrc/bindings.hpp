// One register function per part; each lives in that part's bind_*.cpp.
#pragma once

#include <pybind11/pybind11.h>

namespace packedcomm {

void register_errors(pybind11::module_& module);
void register_copy(pybind11::module_& module);
void register_digest(pybind11::module_& module);
void register_nccl(pybind11::module_& module);

}  // namespace packedcomm
