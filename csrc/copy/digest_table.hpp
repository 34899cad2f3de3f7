// The digest table: which bytes make up each tensor, cut into tiles, once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "copy_table.hpp"
#include "digest.hpp"

namespace packedcomm {

// Not thread-safe while it is being built; read-only afterwards. Accessors never throw.
class DigestTable {
 public:
  // The array's digest will be added to the one with this number.
  void add(const ArrayView& array, std::int64_t number);

  std::int64_t tiles() const noexcept { return tiles_; }
  std::int64_t nbytes() const noexcept { return nbytes_; }
  const std::vector<DigestRow>& rows() const noexcept { return rows_; }
  // Number of the first tile of each row; a row without bytes has one all the same, for its length.
  const std::vector<std::int64_t>& first_tiles() const noexcept { return first_tiles_; }
  const std::vector<DigestDim>& dims() const noexcept { return dims_; }

  // The table as one block of bytes: rows, first tiles, dimensions.
  std::size_t table_bytes() const noexcept;
  void write(void* target) const noexcept;

 private:
  std::int64_t tiles_ = 0;
  std::int64_t nbytes_ = 0;
  std::vector<DigestRow> rows_;
  std::vector<std::int64_t> first_tiles_;
  std::vector<DigestDim> dims_;
};

}  // namespace packedcomm
