// The copy table: strided boxes normalised into segments and cut into tiles, once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "convert.hpp"
#include "segment.hpp"

namespace packedcomm {

// A dense array as the table needs it. Owns nothing: shape and strides point into the tensor.
struct ArrayView {
  std::uint64_t address = 0;
  std::int64_t item_bytes = 1;
  std::size_t dims = 0;
  const std::int64_t* shape = nullptr;
  const std::int64_t* strides = nullptr;  // in items; null means row-major and contiguous

  std::int64_t nbytes() const noexcept;
  bool contiguous() const noexcept;
};

// What happens to values on their way; by default nothing.
struct Conversion {
  int code = kCopyBytes;
  double scale = 1.0;
};

// Which side's addresses are offsets into a buffer that is named when the table is run.
enum class BufferSide { kNone, kSource, kDestination };

// Not thread-safe while it is being built; read-only afterwards. Never throws from accessors.
class CopyTable {
 public:
  // `tile_bytes` must be a multiple of 16.
  CopyTable(std::int64_t tile_bytes, BufferSide buffer_side);

  // Adds the copy of every element of `source` to the same index of `destination`; both have one
  // shape, and the item sizes that the conversion says. Throws Error(kTensor) if two elements of
  // the destination share memory.
  void add(const ArrayView& source, const ArrayView& destination,
           const Conversion& conversion = {});

  // A segment as part of a digest: number `number` (from 0), of `nbytes` bytes, of which this one
  // has those from byte `begin` on, counted in the destination.
  struct DigestPiece {
    std::size_t segment;
    std::int64_t begin;
    std::int64_t number;
    std::int64_t nbytes;
  };
  // Whether that can be told tile by tile: one run that begins and ends at whole words, or where
  // the bytes end.
  bool can_digest(const DigestPiece& piece) const noexcept;
  // From now on a run with digests adds the segment's bytes; needs can_digest.
  void digest(const DigestPiece& piece) noexcept;

  std::int64_t tile_bytes() const noexcept { return tile_bytes_; }
  BufferSide buffer_side() const noexcept { return buffer_side_; }
  Bases bases(std::uint64_t buffer) const noexcept {
    return {buffer_side_ == BufferSide::kSource ? buffer : 0,
            buffer_side_ == BufferSide::kDestination ? buffer : 0};
  }
  // Bytes that a run writes.
  std::int64_t nbytes() const noexcept { return nbytes_; }
  // Bytes that a run reads.
  std::int64_t source_nbytes() const noexcept { return source_nbytes_; }
  bool converts() const noexcept { return converts_; }
  const std::vector<Segment>& segments() const noexcept { return segments_; }
  // Number of the first tile of each segment; tiles are numbered through the whole table.
  const std::vector<std::int64_t>& first_tiles() const noexcept { return first_tiles_; }
  std::int64_t tiles() const noexcept { return tiles_; }

  // The table as one block of bytes: the segments, then their first tiles.
  std::size_t table_bytes() const noexcept;
  void write(void* target) const noexcept;

 private:
  void push(const Segment& segment);

  std::int64_t tile_bytes_;
  BufferSide buffer_side_;
  std::int64_t nbytes_ = 0;
  std::int64_t source_nbytes_ = 0;
  bool converts_ = false;
  std::int64_t tiles_ = 0;
  std::vector<Segment> segments_;
  std::vector<std::int64_t> first_tiles_;
};

}  // namespace packedcomm
