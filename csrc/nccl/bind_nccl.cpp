// NCCL in Python: the library, unique ids and communicators. Pointers and streams are integers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "../bindings.hpp"
#include "../common/error.hpp"
#include "communicator.hpp"
#include "library.hpp"

namespace py = pybind11;

namespace packedcomm {
namespace {

using nccl::Communicator;
using nccl::Library;
using nccl::Operation;
using Kind = nccl::Operation::Kind;
using Address = std::uintptr_t;

// Everything here can wait, or takes locks that a waiting thread may hold.
using NoGil = py::call_guard<py::gil_scoped_release>;

void* pointer(Address address) { return reinterpret_cast<void*>(address); }

// The bytes as an id; the GIL may be released already, so this takes no Python object.
nccl::UniqueId parse_unique_id(const std::string& bytes) {
  nccl::UniqueId id;
  if (bytes.size() != sizeof id.internal) {
    throw Error(ErrorKind::kArgument, "a unique id has " + std::to_string(sizeof id.internal) +
                                          " bytes, got " + std::to_string(bytes.size()));
  }
  std::memcpy(id.internal, bytes.data(), sizeof id.internal);
  return id;
}

nccl::DataType data_type(int value) {
  if (value < 0 || value > static_cast<int>(nccl::DataType::kBfloat16)) {
    throw Error(ErrorKind::kArgument, "unknown NCCL data type " + std::to_string(value));
  }
  return static_cast<nccl::DataType>(value);
}

void issue_bytes(Communicator& communicator, Kind kind, Address data, std::size_t nbytes, int peer,
                 Address stream, double timeout_s) {
  communicator.issue(
      {kind, pointer(data), pointer(data), nbytes, nccl::DataType::kUint8, peer, pointer(stream)},
      timeout_s);
}

template <Kind kind>
void issue_as(Communicator& communicator, Address data, std::size_t nbytes, int peer,
              Address stream, double timeout_s) {
  issue_bytes(communicator, kind, data, nbytes, peer, stream, timeout_s);
}

// (address, bytes) of each buffer, as one group.
void broadcast_many(Communicator& communicator,
                    const std::vector<std::pair<Address, std::size_t>>& buffers, int root,
                    Address stream, double timeout_s) {
  communicator.group_start();
  for (const auto& [data, nbytes] : buffers) {
    issue_bytes(communicator, Kind::kBroadcast, data, nbytes, root, stream, timeout_s);
  }
  communicator.group_end(timeout_s);
}

void all_reduce(Communicator& communicator, Address source, Address destination, std::size_t count,
                int type, Address stream, double timeout_s) {
  communicator.issue({Kind::kAllReduce, pointer(source), pointer(destination), count,
                      data_type(type), 0, pointer(stream)},
                     timeout_s);
}

py::bytes unique_id(const Library& library) {
  nccl::UniqueId id;
  {
    const py::gil_scoped_release release;
    id = library.unique_id();
  }
  return py::bytes(id.internal, sizeof id.internal);
}

py::tuple version(const Library& library) {
  const int code = library.version_code();
  return py::make_tuple(code / 10000, code / 100 % 100, code % 100);
}

}  // namespace

void register_nccl(py::module_& module) {
  // Shared pointers to const: Python must not be able to change a library that others use.
  py::class_<Library, std::shared_ptr<Library>>(module, "NcclLibrary",
                                                "The NCCL library of this process.")
      .def_property_readonly("path", &Library::path)
      .def_property_readonly("version", &version)
      .def("unique_id", &unique_id)
      .def("__repr__", [](const Library& library) {
        return "NcclLibrary(" + library.version() + " from '" + library.path() + "')";
      });

  module.def(
      "nccl_library",
      [](const std::vector<std::string>& candidates, const std::string& named) {
        return std::const_pointer_cast<Library>(Library::open(candidates, named));
      },
      py::arg("candidates"), py::arg("named") = "", NoGil());
  module.def("loaded_nccl_libraries", &Library::loaded, NoGil());

  const auto data = py::arg("data");
  const auto nbytes = py::arg("nbytes");
  const auto stream = py::arg("stream");
  const auto timeout_s = py::arg("timeout_s");
  py::class_<Communicator, std::shared_ptr<Communicator>>(module, "NcclHandle",
                                                          "One NCCL communicator.")
      .def_static(
          "create",
          [](const std::shared_ptr<Library>& library, const std::string& id, int rank,
             int world_size) {
            return Communicator::create(library, parse_unique_id(id), rank, world_size);
          },
          py::arg("library"), py::arg("unique_id"), py::arg("rank"), py::arg("world_size"), NoGil())
      .def_static(
          "adopt",
          [](const std::shared_ptr<Library>& library, Address handle, int rank, int world_size) {
            return Communicator::adopt(library, static_cast<nccl::Comm>(pointer(handle)), rank,
                                       world_size);
          },
          py::arg("library"), py::arg("handle"), py::arg("rank"), py::arg("world_size"), NoGil())
      .def("wait_ready", &Communicator::wait_ready, timeout_s, NoGil())
      .def("device", &Communicator::device, NoGil())
      .def("broadcast", &issue_as<Kind::kBroadcast>, data, nbytes, py::arg("root"), stream,
           timeout_s, NoGil())
      .def("broadcast_many", &broadcast_many, py::arg("buffers"), py::arg("root"), stream,
           timeout_s, NoGil())
      .def("send", &issue_as<Kind::kSend>, data, nbytes, py::arg("peer"), stream, timeout_s,
           NoGil())
      .def("recv", &issue_as<Kind::kRecv>, data, nbytes, py::arg("peer"), stream, timeout_s,
           NoGil())
      .def("all_reduce", &all_reduce, py::arg("source"), py::arg("destination"), py::arg("count"),
           py::arg("data_type"), stream, timeout_s, NoGil())
      .def("group_start", &Communicator::group_start)
      .def("group_end", &Communicator::group_end, timeout_s, NoGil())
      .def("group_cancel", &Communicator::group_cancel)
      .def("check_async_error", &Communicator::check_async_error, NoGil())
      .def("begin_abort", &Communicator::begin_abort, NoGil())
      .def("abort", &Communicator::abort, timeout_s, NoGil())
      .def("destroy", &Communicator::destroy, timeout_s, NoGil());
}

}  // namespace packedcomm
