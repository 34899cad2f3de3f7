// What was known of tensors when something was planned for them, to be compared cheaply later.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "dlpack_reader.hpp"

namespace packedcomm {

// Addresses, types, shapes, strides and devices; no references. Needs the GIL.
class TensorRecord {
 public:
  void add(const TensorView& view);
  std::size_t size() const noexcept { return rows_.size(); }

  // Index of the first tensor that is no longer as it was recorded, or -1. Throws Error(kArgument)
  // if there are not as many tensors as were recorded.
  std::int64_t first_change(const pybind11::sequence& tensors) const;

 private:
  struct Row {
    std::uint64_t address;
    ItemType type;
    DeviceId device;
    std::size_t dims;
  };
  bool is_same(const Row& row, const std::int64_t* layout, const TensorView& view) const;

  std::vector<Row> rows_;
  std::vector<std::int64_t> layouts_;  // of each tensor, its shape and then its strides
};

}  // namespace packedcomm
