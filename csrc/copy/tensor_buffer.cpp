// Checked arithmetic of places in a buffer.
#include "tensor_buffer.hpp"

#include <algorithm>
#include <limits>
#include <utility>

#include "../common/error.hpp"

namespace packedcomm {

std::string shape_text(const std::int64_t* begin, std::size_t count) {
  std::string text = "(";
  for (std::size_t d = 0; d < count; ++d) {
    text += (d == 0 ? "" : ", ") + std::to_string(begin[d]);
  }
  return text + (count == 1 ? ",)" : ")");
}

std::int64_t buffer_end(std::int64_t offset, std::int64_t nbytes) {
  if (offset < 0 || offset > std::numeric_limits<std::int64_t>::max() - nbytes) {
    throw Error(ErrorKind::kArgument, "leaves its buffer: offset " + std::to_string(offset) +
                                          ", size " + std::to_string(nbytes));
  }
  return offset + nbytes;
}

BufferTensor::BufferTensor(std::int64_t offset, std::int64_t item_bytes,
                           std::vector<std::int64_t> shape)
    : offset_(offset), item_bytes_(item_bytes), shape_(std::move(shape)), strides_(shape_.size()) {
  std::int64_t bytes = item_bytes;
  bool empty = false;
  for (std::size_t d = shape_.size(); d-- > 0;) {
    strides_[d] = bytes / item_bytes;
    empty = empty || shape_[d] == 0;
    if (shape_[d] < 0 ||
        (shape_[d] > 0 && bytes > std::numeric_limits<std::int64_t>::max() / shape_[d])) {
      throw Error(ErrorKind::kTensor,
                  "has the impossible shape " + shape_text(shape_.data(), shape_.size()));
    }
    if (shape_[d] > 0) bytes *= shape_[d];
  }
  end_ = buffer_end(offset, empty ? 0 : bytes);
}

ArrayView BufferTensor::box(const std::vector<std::int64_t>& offset, std::size_t dims,
                            const std::int64_t* shape) const {
  if (dims != shape_.size() || offset.size() != shape_.size()) {
    throw Error(ErrorKind::kTensor, "box of shape " + shape_text(shape, dims) + " at " +
                                        shape_text(offset.data(), offset.size()) + ", expected " +
                                        std::to_string(shape_.size()) + " dimensions");
  }
  ArrayView view;
  view.address = static_cast<std::uint64_t>(offset_);
  view.item_bytes = item_bytes_;
  view.dims = dims;
  view.shape = shape;
  view.strides = strides_.data();
  for (std::size_t d = 0; d < dims; ++d) {
    if (offset[d] < 0 || offset[d] > shape_[d] || shape[d] > shape_[d] - offset[d]) {
      throw Error(ErrorKind::kTensor, "box of shape " + shape_text(shape, dims) + " at " +
                                          shape_text(offset.data(), dims) +
                                          " leaves the tensor's shape " +
                                          shape_text(shape_.data(), dims));
    }
    view.address += static_cast<std::uint64_t>(offset[d] * strides_[d] * item_bytes_);
  }
  return view;
}

void BufferTensor::require_shape(const std::int64_t* shape) const {
  if (std::equal(shape_.begin(), shape_.end(), shape)) return;
  throw Error(ErrorKind::kTensor, "part has the shape " + shape_text(shape, shape_.size()) +
                                      ", expected all of " +
                                      shape_text(shape_.data(), shape_.size()));
}

}  // namespace packedcomm
