// A named tensor that lies row-major in a buffer, and boxes of it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "copy_table.hpp"

namespace packedcomm {

// Where something lies in a buffer whose address isn't known yet.
class BufferTensor {
 public:
  // Throws Error(kArgument) if the offset is negative, Error(kTensor) for a shape that is negative
  // or too large.
  BufferTensor(std::int64_t offset, std::int64_t item_bytes, std::vector<std::int64_t> shape);

  // First byte behind it.
  std::int64_t end() const noexcept { return end_; }

  // The view of a box, its address an offset in the buffer; valid while the box's shape and this
  // are. Throws Error(kTensor) if the box leaves the tensor.
  ArrayView box(const std::vector<std::int64_t>& offset, std::size_t dims,
                const std::int64_t* shape) const;

  // Throws Error(kTensor) unless that is all of the tensor's shape, which has as many dimensions.
  void require_shape(const std::int64_t* shape) const;

 private:
  std::int64_t offset_;
  std::int64_t item_bytes_;
  std::int64_t end_;
  std::vector<std::int64_t> shape_;
  std::vector<std::int64_t> strides_;  // in items
};

// "(2, 3)"
std::string shape_text(const std::int64_t* begin, std::size_t count);

// The first byte behind `nbytes` bytes at `offset`. Throws Error(kArgument) if that is no place in
// a buffer.
std::int64_t buffer_end(std::int64_t offset, std::int64_t nbytes);

}  // namespace packedcomm
