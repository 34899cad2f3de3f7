// Normalisation of strided boxes into segments.
#include "copy_table.hpp"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <string>

#include "../common/error.hpp"
#include "tiling.hpp"

namespace packedcomm {
namespace {

struct Dim {
  std::int64_t extent;
  std::int64_t source_stride;
  std::int64_t destination_stride;
};

// True if no two indices address the same destination bytes: each stride steps over everything that
// the dimensions inside it span. Sufficient, and exact for every view that slicing and transposing
// can make.
bool destination_is_injective(std::vector<Dim> dims, std::int64_t item_bytes) {
  std::sort(dims.begin(), dims.end(), [](const Dim& a, const Dim& b) {
    return std::llabs(a.destination_stride) < std::llabs(b.destination_stride);
  });
  std::int64_t span = item_bytes;
  for (const Dim& dim : dims) {
    const std::int64_t stride = std::llabs(dim.destination_stride);
    if (stride < span) return false;
    span += stride * (dim.extent - 1);
  }
  return true;
}

std::vector<std::int64_t> byte_strides(const ArrayView& array) {
  std::vector<std::int64_t> strides(array.dims);
  std::int64_t contiguous = array.item_bytes;
  for (std::size_t d = array.dims; d-- > 0;) {
    strides[d] = array.strides == nullptr ? contiguous : array.strides[d] * array.item_bytes;
    contiguous *= array.shape[d];
  }
  return strides;
}

// Order is free in a copy: dimensions are sorted so that neighbouring runs are neighbours in the
// destination, then merged wherever both sides step through memory without a gap.
std::vector<Dim> normalised(const ArrayView& source, const ArrayView& destination) {
  const std::vector<std::int64_t> source_strides = byte_strides(source);
  const std::vector<std::int64_t> destination_strides = byte_strides(destination);
  std::vector<Dim> dims;
  for (std::size_t d = 0; d < source.dims; ++d) {
    if (source.shape[d] != 1) {
      dims.push_back({source.shape[d], source_strides[d], destination_strides[d]});
    }
  }
  std::stable_sort(dims.begin(), dims.end(), [](const Dim& a, const Dim& b) {
    return std::llabs(a.destination_stride) > std::llabs(b.destination_stride);
  });
  std::vector<Dim> merged;
  for (const Dim& dim : dims) {
    if (!merged.empty() && merged.back().source_stride == dim.extent * dim.source_stride &&
        merged.back().destination_stride == dim.extent * dim.destination_stride) {
      merged.back() = {merged.back().extent * dim.extent, dim.source_stride,
                       dim.destination_stride};
    } else {
      merged.push_back(dim);
    }
  }
  return merged;
}

void set_run(Segment& segment, std::int64_t bytes) {
  if (bytes > kMaxRunBytes) {
    throw Error(ErrorKind::kTensor, "has a run of " + std::to_string(bytes) + " bytes, at most " +
                                        std::to_string(kMaxRunBytes) + " are possible");
  }
  segment.run_bytes = bytes;
}

}  // namespace

std::int64_t ArrayView::nbytes() const noexcept {
  std::int64_t bytes = item_bytes;
  for (std::size_t d = 0; d < dims; ++d) bytes *= shape[d];
  return bytes;
}

bool ArrayView::contiguous() const noexcept {
  if (strides == nullptr) return true;
  std::int64_t expected = 1;
  for (std::size_t d = dims; d-- > 0;) {
    if (shape[d] == 0) return true;
    if (shape[d] != 1 && strides[d] != expected) return false;
    expected *= shape[d];
  }
  return true;
}

CopyTable::CopyTable(std::int64_t tile_bytes, BufferSide buffer_side)
    : tile_bytes_(tile_bytes), buffer_side_(buffer_side) {
  if (tile_bytes < 16 || tile_bytes % 16 != 0) {
    throw Error(ErrorKind::kArgument,
                "tile_bytes must be a multiple of 16, got " + std::to_string(tile_bytes));
  }
}

void CopyTable::add(const ArrayView& source, const ArrayView& destination,
                    const Conversion& conversion) {
  if (source.dims != destination.dims ||
      !std::equal(source.shape, source.shape + source.dims, destination.shape)) {
    throw Error(ErrorKind::kTensor, "source and destination differ in shape");
  }
  if (source.item_bytes != source_bytes_of(conversion.code, destination.item_bytes)) {
    throw Error(ErrorKind::kTensor, "source and destination differ in item size");
  }
  if (destination.nbytes() == 0) return;
  Segment segment{};
  segment.source = source.address;
  segment.destination = destination.address;
  segment.conversion = conversion.code;
  segment.scale = conversion.scale;
  if (source.contiguous() && destination.contiguous()) {
    set_run(segment, destination.nbytes());
    push(segment);
    return;
  }
  std::vector<Dim> dims = normalised(source, destination);
  if (!destination_is_injective(dims, destination.item_bytes)) {
    throw Error(ErrorKind::kTensor, "several elements of the destination share memory");
  }
  std::int64_t run_bytes = destination.item_bytes;
  if (!dims.empty() && dims.back().source_stride == source.item_bytes &&
      dims.back().destination_stride == destination.item_bytes) {
    run_bytes *= dims.back().extent;
    dims.pop_back();
  }
  set_run(segment, run_bytes);
  // Dimensions beyond what a segment holds become one segment per outer index.
  const std::size_t inner = std::min<std::size_t>(dims.size(), kMaxBoxDims);
  const std::size_t outer = dims.size() - inner;
  segment.dims = static_cast<std::int64_t>(inner);
  for (std::size_t d = 0; d < inner; ++d) {
    segment.extent[d] = dims[outer + d].extent;
    segment.source_stride[d] = dims[outer + d].source_stride;
    segment.destination_stride[d] = dims[outer + d].destination_stride;
  }
  std::vector<std::int64_t> index(outer, 0);
  for (;;) {
    Segment row = segment;
    for (std::size_t d = 0; d < outer; ++d) {
      row.source += static_cast<std::uint64_t>(index[d] * dims[d].source_stride);
      row.destination += static_cast<std::uint64_t>(index[d] * dims[d].destination_stride);
    }
    push(row);
    std::size_t d = outer;
    while (d > 0 && ++index[d - 1] == dims[d - 1].extent) index[--d] = 0;
    if (d == 0) break;
  }
}

bool CopyTable::can_digest(const DigestPiece& piece) const noexcept {
  const Segment& segment = segments_[piece.segment];
  const std::int64_t end = piece.begin + segment.run_bytes;
  return segment.dims == 0 && piece.begin % 8 == 0 && (end % 8 == 0 || end == piece.nbytes);
}

void CopyTable::digest(const DigestPiece& piece) noexcept {
  Segment& segment = segments_[piece.segment];
  segment.extent[kDigestNumber] = piece.number + 1;
  segment.extent[kDigestWord] = piece.begin / 8;
  segment.extent[kDigestBytes] = piece.nbytes;
}

void CopyTable::push(const Segment& segment) {
  segments_.push_back(segment);
  first_tiles_.push_back(tiles_);
  tiles_ += tile_count(segment, tile_bytes_);
  const std::int64_t nbytes = run_count(segment) * segment.run_bytes;
  const auto conversion = static_cast<int>(segment.conversion);
  nbytes_ += nbytes;
  source_nbytes_ += source_bytes_of(conversion, nbytes);
  converts_ = converts_ || conversion != kCopyBytes;
}

std::size_t CopyTable::table_bytes() const noexcept {
  return segments_.size() * (sizeof(Segment) + sizeof(std::int64_t));
}

void CopyTable::write(void* target) const noexcept {
  auto* bytes = static_cast<char*>(target);
  const std::size_t rows = segments_.size() * sizeof(Segment);
  std::memcpy(bytes, segments_.data(), rows);
  std::memcpy(bytes + rows, first_tiles_.data(), first_tiles_.size() * sizeof(std::int64_t));
}

}  // namespace packedcomm
