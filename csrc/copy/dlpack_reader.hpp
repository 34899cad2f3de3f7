// Reading tensors of Python without linking their framework: DLPack's C exchange API.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>

#include "convert.hpp"
#include "copy_table.hpp"

namespace packedcomm {

// Where a tensor's memory is, in DLPack's terms, host memory of every kind folded into kHost.
struct DeviceId {
  enum Type : std::int32_t { kHost = 1, kCuda = 2 };
  std::int32_t type;
  std::int32_t index;
  bool operator==(const DeviceId& other) const {
    return type == other.type && index == other.index;
  }
};

// An element type in DLPack's terms.
struct ItemType {
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
  bool operator==(const ItemType& other) const {
    return code == other.code && bits == other.bits && lanes == other.lanes;
  }
  // The type as one that values can be cast to and from, if it is one.
  std::optional<FloatType> float_type() const noexcept;
};

struct TensorView {
  ArrayView array;
  ItemType type;
  DeviceId device;
};

// Reads address, shape and strides of a tensor. Needs the GIL; takes no reference, so the view is
// valid while the caller keeps the tensor. Throws Error(kTensor) for a tensor whose bytes are not
// all there is to it: sparse, quantised, wrapping others, lazily conjugated or negated, without
// storage. The message doesn't name the tensor.
TensorView read_tensor(pybind11::handle tensor);

}  // namespace packedcomm
