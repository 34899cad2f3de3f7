// Normalisation of strided arrays into runs in row-major order.
#include "digest_table.hpp"

#include <algorithm>
#include <cstring>

namespace packedcomm {

void DigestTable::add(const ArrayView& array, std::int64_t number) {
  DigestRow row{array.address,
                number,
                array.nbytes(),
                array.nbytes(),
                static_cast<std::int64_t>(dims_.size()),
                0};
  if (row.nbytes > 0 && !array.contiguous()) {
    row.run_bytes = array.item_bytes;
    for (std::size_t d = 0; d < array.dims; ++d) {
      if (array.shape[d] == 1) continue;
      const DigestDim dim{array.shape[d], array.strides[d] * array.item_bytes};
      // Order matters here, so only neighbours are merged.
      if (row.dims > 0 && dims_.back().stride == dim.extent * dim.stride) {
        dims_.back() = {dims_.back().extent * dim.extent, dim.stride};
      } else {
        dims_.push_back(dim);
        ++row.dims;
      }
    }
    if (row.dims > 0 && dims_.back().stride == array.item_bytes) {
      row.run_bytes *= dims_.back().extent;
      dims_.pop_back();
      --row.dims;
    }
  }
  rows_.push_back(row);
  first_tiles_.push_back(tiles_);
  tiles_ += std::max<std::int64_t>((row.nbytes + kDigestTileBytes - 1) / kDigestTileBytes, 1);
  nbytes_ += row.nbytes;
}

std::size_t DigestTable::table_bytes() const noexcept {
  return rows_.size() * (sizeof(DigestRow) + sizeof(std::int64_t)) +
         dims_.size() * sizeof(DigestDim);
}

void DigestTable::write(void* target) const noexcept {
  auto* bytes = static_cast<char*>(target);
  const auto append = [&](const auto& items) {
    const std::size_t size = items.size() * sizeof(items[0]);
    if (size > 0) std::memcpy(bytes, items.data(), size);
    bytes += size;
  };
  append(rows_);
  append(first_tiles_);
  append(dims_);
}

}  // namespace packedcomm
