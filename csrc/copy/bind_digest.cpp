// The digest table in Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <vector>

#include "../bindings.hpp"
#include "../common/error.hpp"
#include "digest_cpu.hpp"
#include "digest_table.hpp"
#include "digest_words_cpu.hpp"
#include "tensor_arguments.hpp"
#include "tensor_record.hpp"
#ifdef PACKEDCOMM_CUDA_ARCHITECTURES
#include "digest_cuda.hpp"
#endif

namespace py = pybind11;

namespace packedcomm {
namespace {

// A digest table of one device, and a record of the tensors in it.
class DeviceDigests {
 public:
  DeviceDigests(const std::string& device_type, std::int32_t device_index)
      : device_(device_id(device_type, device_index)) {}

  void add(const py::list& tensors, const py::object& names,
           const std::vector<std::int64_t>& numbers) {
    if (numbers.size() != tensors.size()) {
      throw Error(ErrorKind::kArgument, "tensors and numbers differ in number");
    }
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      for_tensor(names, i, [&] {
        const TensorView view = read_tensor_on(device_, tensors[i]);
        table_.add(view.array, numbers[i]);
        record_.add(view);
      });
    }
  }

  void compute(std::uint64_t digests, int threads) const {
    if (device_.type != DeviceId::kHost) {
      throw Error(ErrorKind::kArgument, "this table is of " + device_name(device_));
    }
    const py::gil_scoped_release unlocked;
    digest_on_cpu(table_, reinterpret_cast<std::uint64_t*>(digests), threads);
  }

  void write(std::uint64_t address, std::size_t capacity) const {
    if (capacity < table_.table_bytes()) {
      throw Error(ErrorKind::kArgument, "the table doesn't fit its staging memory");
    }
    table_.write(reinterpret_cast<void*>(address));
  }

  void launch([[maybe_unused]] std::uint64_t table_address, [[maybe_unused]] std::uint64_t stream,
              [[maybe_unused]] std::uint64_t digests, [[maybe_unused]] int blocks) const {
    if (device_.type != DeviceId::kCuda) {
      throw Error(ErrorKind::kArgument, "this table is of the CPU");
    }
#ifdef PACKEDCOMM_CUDA_ARCHITECTURES
    const py::gil_scoped_release unlocked;
    digest_on_cuda(table_, table_address, digests, stream, blocks);
#else
    throw Error(ErrorKind::kCuda,
                "packedcomm was built without CUDA: build it again where nvcc is on PATH");
#endif
  }

  std::int64_t first_change(const py::sequence& tensors) const {
    return record_.first_change(tensors);
  }
  const DigestTable& table() const { return table_; }

 private:
  DeviceId device_;
  DigestTable table_;
  TensorRecord record_;
};

}  // namespace

void register_digest(py::module_& module) {
  py::class_<DeviceDigests>(module, "DigestTable")
      .def(py::init<const std::string&, std::int32_t>(), py::arg("device_type"),
           py::arg("device_index"))
      .def("add", &DeviceDigests::add, py::arg("tensors"), py::arg("names"), py::arg("numbers"))
      .def("first_change", &DeviceDigests::first_change, py::arg("tensors"))
      .def("compute", &DeviceDigests::compute, py::arg("digests"), py::arg("threads"))
      .def("write", &DeviceDigests::write, py::arg("address"), py::arg("capacity"))
      .def("launch", &DeviceDigests::launch, py::arg("table_address"), py::arg("stream"),
           py::arg("digests"), py::arg("blocks"))
      .def_property_readonly("nbytes", [](const DeviceDigests& d) { return d.table().nbytes(); })
      .def_property_readonly("table_bytes",
                             [](const DeviceDigests& d) { return d.table().table_bytes(); });
  module.def("digest_paths", &digest_paths);
  module.def(
      "digest_bytes_by",
      [](const std::string& path, std::uint64_t address, std::int64_t nbytes, std::uint64_t index) {
        const py::gil_scoped_release unlocked;
        return digest_bytes_by(path, reinterpret_cast<const char*>(address), nbytes, index);
      },
      py::arg("path"), py::arg("address"), py::arg("nbytes"), py::arg("index"));
}

}  // namespace packedcomm
