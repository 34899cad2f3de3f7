// The module definition and nothing else.
#include "bindings.hpp"

PYBIND11_MODULE(_native, module) {
  module.doc() = "The compiled core of packedcomm: copy engine and NCCL.";
  packedcomm::register_errors(module);
  packedcomm::register_copy(module);
  packedcomm::register_digest(module);
  packedcomm::register_nccl(module);
}
