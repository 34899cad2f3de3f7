// One row of the copy table: a strided box with a source and a destination.
#pragma once

#include <cstdint>

namespace packedcomm {

constexpr int kMaxBoxDims = 4;
// A run's length has 48 bits, one of them the sign.
constexpr std::int64_t kMaxRunBytes = (std::int64_t{1} << 47) - 1;

// A box is a contiguous run repeated over up to four outer dimensions, outermost first. A
// contiguous copy is one run with dims == 0. Addresses are absolute, or offsets into a buffer that
// is named when the table is run; strides are in bytes. Lengths are counted in the destination: a
// run of the source is longer or shorter if its values are converted. The layout is read by host
// and device alike.
struct Segment {
  std::uint64_t source;
  std::uint64_t destination;
  std::int64_t run_bytes : 48;
  std::int64_t dims : 8;
  std::int64_t conversion : 8;  // see convert.hpp
  double scale;                 // factor of a conversion
  std::int64_t extent[kMaxBoxDims];
  std::int64_t source_stride[kMaxBoxDims];
  std::int64_t destination_stride[kMaxBoxDims];
};
static_assert(sizeof(Segment) == 128, "the table is uploaded as raw bytes");

// A run without outer dimensions has no extents; where it is all of a digest's bytes, or a piece of
// them, the first three say which digest.
constexpr int kDigestNumber = 0;  // counted from 1; 0 means none
constexpr int kDigestWord = 1;    // number of the run's first word
constexpr int kDigestBytes = 2;   // bytes of all pieces together

// Added to every address of one side of a table when it is run; 0 where addresses are absolute.
struct Bases {
  std::uint64_t source = 0;
  std::uint64_t destination = 0;
};

}  // namespace packedcomm
