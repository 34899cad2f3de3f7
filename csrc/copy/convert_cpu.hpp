// Conversion of float values on the CPU.
#pragma once

#include <cstdint>

namespace packedcomm {

// Converts `runs` runs of `items` contiguous values each; the strides, in bytes, lead from one run
// to the next. Any alignment. Source and destination must not overlap.
using ConvertRow = void (*)(char* to, std::int64_t to_stride, const char* from,
                            std::int64_t from_stride, std::int64_t runs, std::int64_t items,
                            double scale);

// The function for a segment's conversion, which must not be kCopyBytes.
ConvertRow convert_row_of(int conversion) noexcept;

}  // namespace packedcomm
