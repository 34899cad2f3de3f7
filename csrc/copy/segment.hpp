// One row of the copy table: a strided box of bytes with a source and a destination.
#pragma once

#include <cstdint>

namespace packedcomm {

constexpr int kMaxBoxDims = 4;

// A box is `run_bytes` contiguous bytes (a run) repeated over up to four outer dimensions,
// outermost first. A contiguous copy is one run with dims == 0. Addresses are absolute, strides are
// in bytes. The layout is read by host and device alike.
struct Segment {
  std::uint64_t source;
  std::uint64_t destination;
  std::int64_t run_bytes;
  std::int64_t dims;
  std::int64_t extent[kMaxBoxDims];
  std::int64_t source_stride[kMaxBoxDims];
  std::int64_t destination_stride[kMaxBoxDims];
};
static_assert(sizeof(Segment) == 128, "the table is uploaded as raw bytes");

}  // namespace packedcomm
