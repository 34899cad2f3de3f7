// Translation of packedcomm::Error into the Python classes of packedcomm.errors.
#include <pybind11/pybind11.h>

#include "../bindings.hpp"
#include "error.hpp"

namespace py = pybind11;

namespace packedcomm {
namespace {

const char* class_name(ErrorKind kind) {
  switch (kind) {
    case ErrorKind::kArgument:
      return "ArgumentError";
    case ErrorKind::kTensor:
      return "TensorError";
    case ErrorKind::kRendezvousTimeout:
      return "RendezvousTimeout";
    case ErrorKind::kDeadlineExceeded:
      return "DeadlineExceeded";
    case ErrorKind::kPeerLost:
      return "PeerLost";
    case ErrorKind::kVersionMismatch:
      return "VersionMismatch";
    case ErrorKind::kNccl:
      return "NcclError";
    case ErrorKind::kCuda:
      return "CudaError";
    case ErrorKind::kContextLost:
      return "ContextLost";
    case ErrorKind::kSessionState:
      return "SessionStateError";
  }
  return "PackedCommError";
}

}  // namespace

void register_errors(py::module_&) {
  py::register_local_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const Error& error) {
      // Looked up at each raise: the module is loaded long before any of this can fail.
      const py::object type =
          py::module_::import("packedcomm.errors").attr(class_name(error.kind()));
      PyErr_SetString(type.ptr(), error.what());
    }
  });
}

}  // namespace packedcomm
