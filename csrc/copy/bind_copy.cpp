// The copy table in Python: built from tensors, run on a CPU or launched on a stream.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "../bindings.hpp"
#include "../common/error.hpp"
#include "copy_cpu.hpp"
#include "copy_table.hpp"
#include "dlpack_reader.hpp"
#include "tensor_arguments.hpp"
#include "tensor_buffer.hpp"
#include "tensor_record.hpp"
#ifdef PACKEDCOMM_CUDA_ARCHITECTURES
#include "copy_cuda.hpp"
#endif

namespace py = pybind11;

namespace packedcomm {
namespace {

BufferSide buffer_side_of(const std::string& name) {
  if (name.empty()) return BufferSide::kNone;
  if (name == "source") return BufferSide::kSource;
  if (name == "destination") return BufferSide::kDestination;
  throw Error(ErrorKind::kArgument, "unknown side of a table '" + name + "'");
}

void require_equal(std::size_t a, std::size_t b, const char* what) {
  if (a != b) throw Error(ErrorKind::kArgument, std::string(what) + " differ in number");
}

// How values of one tensor become values of the other. `cast` allows types to differ; the tensors
// are only asked for their types' names when these don't fit.
Conversion conversion_between(const ItemType& source_type, py::handle source,
                              const ItemType& destination_type, py::handle destination,
                              double scale, bool cast) {
  const bool same = source_type == destination_type;
  if (same && scale == 1.0) return {};
  const auto from = source_type.float_type();
  const auto to = destination_type.float_type();
  const auto name = [](py::handle tensor) { return std::string(py::str(tensor.attr("dtype"))); };
  if (!same && !(from && to && cast)) {
    throw Error(ErrorKind::kTensor,
                "source is " + name(source) + ", destination " + name(destination) +
                    (from && to ? ": values are cast only where that is asked for"
                                : ": only float64, float32, float16 and bfloat16 can be cast"));
  }
  if (!from || !to) {
    throw Error(ErrorKind::kTensor, "is " + name(source) +
                                        ": only float64, float32, float16 and "
                                        "bfloat16 can be scaled, by " +
                                        std::to_string(scale));
  }
  const bool wide = *from == FloatType::kFloat64 || *to == FloatType::kFloat64;
  if (!std::isfinite(wide ? scale : static_cast<float>(scale))) {
    throw Error(ErrorKind::kTensor, "scale " + std::string(py::str(py::float_(scale))) +
                                        " is not a finite number of " +
                                        (wide ? "float64" : "float32"));
  }
  return {conversion_of(*from, *to), scale};
}

// A copy table of one device, and a record of the tensors in it.
class DeviceTable {
 public:
  DeviceTable(const std::string& device_type, std::int32_t device_index, std::int64_t tile_bytes,
              const std::string& buffer_side)
      : device_(device_id(device_type, device_index)),
        table_(tile_bytes, buffer_side_of(buffer_side)) {}

  void add_pairs(const py::list& sources, const py::list& destinations, const py::object& names,
                 const std::vector<double>& scales, bool cast) {
    require_buffer(false);
    require_equal(sources.size(), destinations.size(), "sources and destinations");
    require_equal(sources.size(), scales.size(), "tensors and scales");
    for (std::size_t i = 0; i < sources.size(); ++i) {
      for_tensor(names, i, [&] {
        const TensorView source = read(sources[i]);
        const TensorView destination = read(destinations[i]);
        table_.add(source.array, destination.array,
                   conversion_between(source.type, sources[i], destination.type, destinations[i],
                                      scales[i], cast));
        record_.add(source);
        record_.add(destination);
      });
    }
  }

  // Whole tensors to or from the buffer, each contiguous there at its offset. `numbers` are those
  // of their digests; empty where none will be asked for.
  void add_packed(const py::list& tensors, const py::object& names, const py::sequence& offsets,
                  const py::sequence& sizes, const std::vector<std::int64_t>& numbers) {
    require_buffer(true);
    if (!numbers.empty()) require_equal(tensors.size(), numbers.size(), "tensors and numbers");
    if (tensors.size() != offsets.size() || tensors.size() != sizes.size()) {
      throw Error(ErrorKind::kArgument, "tensors, offsets and sizes differ in number");
    }
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      for_tensor(names, i, [&] {
        const TensorView tensor = read(tensors[i]);
        const auto offset = offsets[i].cast<std::int64_t>();
        const auto size = sizes[i].cast<std::int64_t>();
        if (tensor.array.nbytes() != size) {
          throw Error(ErrorKind::kTensor, "has " + std::to_string(tensor.array.nbytes()) +
                                              " bytes, expected " + std::to_string(size));
        }
        extent_ = std::max(extent_, buffer_end(offset, size));
        ArrayView packed = tensor.array;
        packed.address = static_cast<std::uint64_t>(offset);
        packed.strides = nullptr;
        const std::size_t before = table_.segments().size();
        into_buffer() ? table_.add(tensor.array, packed) : table_.add(packed, tensor.array);
        record_.add(tensor);
        if (!numbers.empty() && table_.segments().size() == before + 1) {
          digest_pieces({{before, 0, numbers[i], size}});
        }
      });
    }
  }

  // Boxes of one named tensor, which lies row-major in the buffer. `like` has the named tensor's
  // type. `number` is that of the named tensor's digest, or of the first part's where the parts are
  // taken from the buffer; negative where none will be asked for.
  void add_parts(const py::list& tensors, const py::list& offsets,
                 const std::vector<double>& scales, const py::object& like,
                 std::vector<std::int64_t> shape, std::int64_t offset, const py::object& name,
                 std::int64_t number) {
    require_buffer(true);
    require_equal(tensors.size(), offsets.size(), "tensors and offsets");
    require_equal(tensors.size(), scales.size(), "tensors and scales");
    for_tensor(py::make_tuple(name), 0, [&] {
      const TensorView named = read_tensor(like);
      const std::vector<std::int64_t> whole(shape.size(), 0);
      const BufferTensor packed(offset, named.array.item_bytes, std::move(shape));
      const std::int64_t nbytes = packed.end() - offset;
      std::vector<CopyTable::DigestPiece> pieces;
      std::int64_t whole_runs = 0;
      for (std::size_t i = 0; i < tensors.size(); ++i) {
        const TensorView part = read(tensors[i]);
        const bool is_whole = offsets[i].is_none();
        const ArrayView box =
            packed.box(is_whole ? whole : offsets[i].cast<std::vector<std::int64_t>>(),
                       part.array.dims, part.array.shape);
        if (is_whole) packed.require_shape(part.array.shape);
        const std::size_t before = table_.segments().size();
        if (into_buffer()) {
          table_.add(part.array, box,
                     conversion_between(part.type, tensors[i], named.type, like, scales[i], true));
        } else {
          table_.add(box, part.array,
                     conversion_between(named.type, like, part.type, tensors[i], scales[i], true));
        }
        record_.add(part);
        if (number < 0 || table_.segments().size() != before + 1) continue;
        if (into_buffer()) {
          const auto begin = static_cast<std::int64_t>(box.address) - offset;
          pieces.push_back({before, begin, number, nbytes});
          whole_runs += table_.segments()[before].run_bytes;
        } else {
          digest_pieces({{before, 0, number + static_cast<std::int64_t>(i), part.array.nbytes()}});
        }
      }
      // Parts that leave something out, or that aren't one run each, don't make up the digest.
      if (number >= 0 && pieces.size() == tensors.size() && whole_runs == nbytes) {
        digest_pieces(pieces);
      }
      extent_ = std::max(extent_, packed.end());
    });
  }

  void copy(int threads, std::uint64_t buffer, std::uint64_t digests) const {
    if (device_.type != DeviceId::kHost) {
      throw Error(ErrorKind::kArgument, "this table is of " + device_name(device_));
    }
    const py::gil_scoped_release unlocked;
    copy_on_cpu(table_, buffer, reinterpret_cast<std::uint64_t*>(digests), threads);
  }

  void write(std::uint64_t address, std::size_t capacity) const {
    if (capacity < table_.table_bytes()) {
      throw Error(ErrorKind::kArgument, "the table doesn't fit its staging memory");
    }
    table_.write(reinterpret_cast<void*>(address));
  }

  void launch([[maybe_unused]] std::uint64_t table_address, [[maybe_unused]] std::uint64_t stream,
              [[maybe_unused]] int blocks, [[maybe_unused]] std::uint64_t buffer,
              [[maybe_unused]] std::uint64_t digests) const {
    if (device_.type != DeviceId::kCuda) {
      throw Error(ErrorKind::kArgument, "this table is of the CPU");
    }
#ifdef PACKEDCOMM_CUDA_ARCHITECTURES
    const py::gil_scoped_release unlocked;
    copy_on_cuda(table_, table_address, buffer, digests, stream, blocks);
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
        const ArrayView view = read(tensors[i]).array;
        rows.append(py::make_tuple(view.address, view.nbytes(), view.contiguous()));
      });
    }
    return rows;
  }

  // Payload: what the buffer holds of it, or the destinations.
  std::int64_t nbytes() const noexcept {
    return table_.buffer_side() == BufferSide::kSource ? table_.source_nbytes() : table_.nbytes();
  }
  std::int64_t extent() const noexcept { return extent_; }
  std::int64_t first_change(const py::sequence& tensors) const {
    return record_.first_change(tensors);
  }
  const CopyTable& table() const { return table_; }
  // Numbers of the digests that a run with digests makes.
  const std::vector<std::int64_t>& digested() const noexcept { return digested_; }
  // How many digests such a run must be given.
  std::int64_t digest_extent() const noexcept { return digest_extent_; }

 private:
  // Have the copies make one digest, if all pieces of it can be told tile by tile.
  void digest_pieces(const std::vector<CopyTable::DigestPiece>& pieces) {
    const auto can = [&](const auto& piece) { return table_.can_digest(piece); };
    if (pieces.empty() || !std::all_of(pieces.begin(), pieces.end(), can)) return;
    for (const auto& piece : pieces) table_.digest(piece);
    digested_.push_back(pieces.front().number);
    digest_extent_ = std::max(digest_extent_, pieces.front().number + 1);
  }

  bool into_buffer() const noexcept { return table_.buffer_side() == BufferSide::kDestination; }

  void require_buffer(bool wanted) const {
    if ((table_.buffer_side() != BufferSide::kNone) != wanted) {
      throw Error(ErrorKind::kArgument, wanted ? "this table has no buffer"
                                               : "this table is between a buffer and tensors");
    }
  }

  TensorView read(py::handle tensor) const { return read_tensor_on(device_, tensor); }

  DeviceId device_;
  CopyTable table_;
  TensorRecord record_;
  std::int64_t extent_ = 0;
  std::vector<std::int64_t> digested_;
  std::int64_t digest_extent_ = 0;
};

TensorRecord record_of(const py::sequence& tensors) {
  TensorRecord record;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    for_tensor(py::none(), i, [&] { record.add(read_tensor(tensors[i])); });
  }
  return record;
}

}  // namespace

void register_copy(py::module_& module) {
#ifdef PACKEDCOMM_CUDA_ARCHITECTURES
  module.attr("cuda_architectures") = PACKEDCOMM_CUDA_ARCHITECTURES;
#else
  module.attr("cuda_architectures") = "";
#endif
  py::class_<TensorRecord>(module, "TensorRecord")
      .def(py::init(&record_of), py::arg("tensors"))
      .def("first_change", &TensorRecord::first_change, py::arg("tensors"));
  py::class_<DeviceTable>(module, "CopyTable")
      .def(py::init<const std::string&, std::int32_t, std::int64_t, const std::string&>(),
           py::arg("device_type"), py::arg("device_index"), py::arg("tile_bytes"),
           py::arg("buffer_side") = "")
      .def("add_pairs", &DeviceTable::add_pairs, py::arg("sources"), py::arg("destinations"),
           py::arg("names"), py::arg("scales"), py::arg("cast"))
      .def("add_packed", &DeviceTable::add_packed, py::arg("tensors"), py::arg("names"),
           py::arg("offsets"), py::arg("sizes"), py::arg("numbers"))
      .def("add_parts", &DeviceTable::add_parts, py::arg("tensors"), py::arg("offsets"),
           py::arg("scales"), py::arg("like"), py::arg("shape"), py::arg("offset"), py::arg("name"),
           py::arg("number"))
      .def("describe", &DeviceTable::describe, py::arg("tensors"), py::arg("names"))
      .def("first_change", &DeviceTable::first_change, py::arg("tensors"))
      .def("copy", &DeviceTable::copy, py::arg("threads"), py::arg("buffer") = 0,
           py::arg("digests") = 0)
      .def("write", &DeviceTable::write, py::arg("address"), py::arg("capacity"))
      .def("launch", &DeviceTable::launch, py::arg("table_address"), py::arg("stream"),
           py::arg("blocks"), py::arg("buffer") = 0, py::arg("digests") = 0)
      .def_property_readonly("nbytes", &DeviceTable::nbytes)
      .def_property_readonly("extent", &DeviceTable::extent)
      .def_property_readonly("digested", &DeviceTable::digested)
      .def_property_readonly("digest_extent", &DeviceTable::digest_extent)
      .def_property_readonly("segments",
                             [](const DeviceTable& t) { return t.table().segments().size(); })
      .def_property_readonly("tiles", [](const DeviceTable& t) { return t.table().tiles(); })
      .def_property_readonly("table_bytes",
                             [](const DeviceTable& t) { return t.table().table_bytes(); });
}

}  // namespace packedcomm
