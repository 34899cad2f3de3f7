// The copy table in Python: built from tensors, run on a CPU or launched on a stream.
#include <pybind11/pybind11.h>

#include <limits>
#include <string>

#include "../bindings.hpp"
#include "../common/error.hpp"
#include "copy_cpu.hpp"
#include "copy_table.hpp"
#include "dlpack_reader.hpp"
#ifdef PACKEDCOMM_CUDA_ARCHITECTURES
#include "copy_cuda.hpp"
#endif

namespace py = pybind11;

namespace packedcomm {
namespace {

std::string device_name(const DeviceId& device) {
  return device.type == DeviceId::kHost ? "cpu" : "cuda:" + std::to_string(device.index);
}

DeviceId device_id(const std::string& type, std::int32_t index) {
  if (type == "cpu") return {DeviceId::kHost, 0};
  if (type == "cuda") return {DeviceId::kCuda, index};
  throw Error(ErrorKind::kTensor, "unsupported device type '" + type + "'");
}

// Calls `body` for one tensor; an error leaves with the tensor's name, or its position, in front.
template <typename Body>
void for_tensor(const py::object& names, std::size_t i, const Body& body) {
  try {
    body();
  } catch (const Error& error) {
    const std::string name =
        names.is_none() ? "#" + std::to_string(i) : std::string(py::str(names[py::int_(i)]));
    throw Error(error.kind(), "tensor '" + name + "': " + error.what());
  }
}

// A copy table of one device.
class DeviceTable {
 public:
  DeviceTable(const std::string& device_type, std::int32_t device_index, std::int64_t tile_bytes)
      : device_(device_id(device_type, device_index)), table_(tile_bytes) {}

  void add_pairs(const py::list& sources, const py::list& destinations, const py::object& names) {
    if (sources.size() != destinations.size()) {
      throw Error(ErrorKind::kArgument, "sources and destinations differ in number");
    }
    for (std::size_t i = 0; i < sources.size(); ++i) {
      for_tensor(names, i, [&] { table_.add(read(sources[i]), read(destinations[i])); });
    }
  }

  // Tensors to or from one buffer of `buffer_bytes` bytes, each contiguous there at its offset.
  void add_packed(const py::list& tensors, const py::object& names, std::uint64_t buffer,
                  std::int64_t buffer_bytes, const py::sequence& offsets, const py::sequence& sizes,
                  bool into_buffer) {
    if (tensors.size() != offsets.size() || tensors.size() != sizes.size()) {
      throw Error(ErrorKind::kArgument, "tensors, offsets and sizes differ in number");
    }
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      for_tensor(names, i, [&] {
        const ArrayView tensor = read(tensors[i]);
        const auto offset = offsets[i].cast<std::int64_t>();
        const auto size = sizes[i].cast<std::int64_t>();
        if (tensor.nbytes() != size) {
          throw Error(ErrorKind::kTensor, "has " + std::to_string(tensor.nbytes()) +
                                              " bytes, expected " + std::to_string(size));
        }
        if (offset < 0 || size > buffer_bytes || offset > buffer_bytes - size) {
          throw Error(ErrorKind::kArgument, "leaves its buffer of " + std::to_string(buffer_bytes) +
                                                " bytes: offset " + std::to_string(offset) +
                                                ", size " + std::to_string(size));
        }
        ArrayView packed = tensor;
        packed.address = buffer + static_cast<std::uint64_t>(offset);
        packed.strides = nullptr;
        into_buffer ? table_.add(tensor, packed) : table_.add(packed, tensor);
      });
    }
  }

  void copy(int threads) const {
    if (device_.type != DeviceId::kHost) {
      throw Error(ErrorKind::kArgument, "this table is of " + device_name(device_));
    }
    const py::gil_scoped_release unlocked;
    copy_on_cpu(table_, threads);
  }

  void write(std::uint64_t address, std::size_t capacity) const {
    if (capacity < table_.table_bytes()) {
      throw Error(ErrorKind::kArgument, "the table doesn't fit its staging memory");
    }
    table_.write(reinterpret_cast<void*>(address));
  }

  void launch([[maybe_unused]] std::uint64_t table_address, [[maybe_unused]] std::uint64_t stream,
              [[maybe_unused]] int blocks) const {
    if (device_.type != DeviceId::kCuda) {
      throw Error(ErrorKind::kArgument, "this table is of the CPU");
    }
#ifdef PACKEDCOMM_CUDA_ARCHITECTURES
    const py::gil_scoped_release unlocked;
    copy_on_cuda(table_address, static_cast<std::int64_t>(table_.segments().size()), table_.tiles(),
                 table_.tile_bytes(), stream, blocks);
#else
    throw Error(ErrorKind::kCuda,
                "packedcomm was built without CUDA: build it again where nvcc is on PATH");
#endif
  }

  // (address, bytes, contiguous) of each tensor, after the same checks as for a copy.
  py::list describe(const py::list& tensors, const py::object& names) const {
    py::list rows;
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      for_tensor(names, i, [&] {
        const ArrayView view = read(tensors[i]);
        rows.append(py::make_tuple(view.address, view.nbytes(), view.contiguous()));
      });
    }
    return rows;
  }

  const CopyTable& table() const { return table_; }

 private:
  ArrayView read(py::handle tensor) const {
    const TensorView view = read_tensor(tensor);
    if (!(view.device == device_) && view.array.nbytes() > 0) {
      throw Error(ErrorKind::kTensor,
                  "is on " + device_name(view.device) + ", expected " + device_name(device_));
    }
    return view.array;
  }

  DeviceId device_;
  CopyTable table_;
};

}  // namespace

void register_copy(py::module_& module) {
#ifdef PACKEDCOMM_CUDA_ARCHITECTURES
  module.attr("cuda_architectures") = PACKEDCOMM_CUDA_ARCHITECTURES;
#else
  module.attr("cuda_architectures") = "";
#endif
  py::class_<DeviceTable>(module, "CopyTable")
      .def(py::init<const std::string&, std::int32_t, std::int64_t>(), py::arg("device_type"),
           py::arg("device_index"), py::arg("tile_bytes"))
      .def("add_pairs", &DeviceTable::add_pairs, py::arg("sources"), py::arg("destinations"),
           py::arg("names"))
      .def("add_packed", &DeviceTable::add_packed, py::arg("tensors"), py::arg("names"),
           py::arg("buffer"), py::arg("buffer_bytes"), py::arg("offsets"), py::arg("sizes"),
           py::arg("into_buffer"))
      .def("describe", &DeviceTable::describe, py::arg("tensors"), py::arg("names"))
      .def("copy", &DeviceTable::copy, py::arg("threads"))
      .def("write", &DeviceTable::write, py::arg("address"), py::arg("capacity"))
      .def("launch", &DeviceTable::launch, py::arg("table_address"), py::arg("stream"),
           py::arg("blocks"))
      .def_property_readonly("nbytes", [](const DeviceTable& t) { return t.table().nbytes(); })
      .def_property_readonly("segments",
                             [](const DeviceTable& t) { return t.table().segments().size(); })
      .def_property_readonly("tiles", [](const DeviceTable& t) { return t.table().tiles(); })
      .def_property_readonly("table_bytes",
                             [](const DeviceTable& t) { return t.table().table_bytes(); });
}

}  // namespace packedcomm
