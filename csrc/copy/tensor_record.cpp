// Recording and comparing what DLPack says of tensors.
#include "tensor_record.hpp"

#include <algorithm>
#include <string>

#include "../common/error.hpp"

namespace py = pybind11;

namespace packedcomm {

void TensorRecord::add(const TensorView& view) {
  const ArrayView& array = view.array;
  rows_.push_back({array.address, view.type, view.device, array.dims});
  layouts_.insert(layouts_.end(), array.shape, array.shape + array.dims);
  layouts_.insert(layouts_.end(), array.strides, array.strides + array.dims);
}

bool TensorRecord::is_same(const Row& row, const std::int64_t* layout,
                           const TensorView& view) const {
  const ArrayView& array = view.array;
  return array.address == row.address && array.dims == row.dims && view.type == row.type &&
         view.device == row.device && std::equal(array.shape, array.shape + row.dims, layout) &&
         std::equal(array.strides, array.strides + row.dims, layout + row.dims);
}

std::int64_t TensorRecord::first_change(const py::sequence& tensors) const {
  const py::object items = py::reinterpret_steal<py::object>(
      PySequence_Fast(tensors.ptr(), "tensors must be a sequence"));
  if (!items) throw py::error_already_set();
  if (static_cast<std::size_t>(PySequence_Fast_GET_SIZE(items.ptr())) != rows_.size()) {
    throw Error(ErrorKind::kArgument, "expected " + std::to_string(rows_.size()) +
                                          " tensors, got " +
                                          std::to_string(PySequence_Fast_GET_SIZE(items.ptr())));
  }
  const std::int64_t* layout = layouts_.data();
  for (std::size_t i = 0; i < rows_.size(); ++i) {
    const Row& row = rows_[i];
    try {
      const auto at = static_cast<Py_ssize_t>(i);
      if (!is_same(row, layout, read_tensor(PySequence_Fast_GET_ITEM(items.ptr(), at)))) {
        return static_cast<std::int64_t>(i);
      }
    } catch (const Error&) {
      return static_cast<std::int64_t>(i);  // it can't even be read any more
    }
    layout += 2 * row.dims;
  }
  return -1;
}

}  // namespace packedcomm
