// Reading tensors of Python without linking their framework: DLPack's C exchange API.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

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

struct TensorView {
  ArrayView array;
  DeviceId device;
};

// Reads address, shape and strides of a tensor. Needs the GIL; takes no reference, so the view is
// valid while the caller keeps the tensor. Throws Error(kTensor) for a tensor whose bytes are not
// all there is to it: sparse, quantised, wrapping others, lazily conjugated or negated, without
// storage. The message doesn't name the tensor.
TensorView read_tensor(pybind11::handle tensor);

}  // namespace packedcomm
