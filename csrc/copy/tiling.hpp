// How a segment is cut into tiles, and where a run of a segment lies: shared by host and device.
#pragma once

#include <cstdint>

#include "convert.hpp"
#include "segment.hpp"

namespace packedcomm {

// What one tile copies: `runs` runs from `first_run` on, of each the `bytes` bytes at `offset`,
// both counted in the destination. Either a tile has several whole runs or it is a piece of one
// run. Pieces begin at whole items, since a tile's size is a multiple of 16.
struct TileSpan {
  std::int64_t first_run;
  std::int64_t runs;
  std::int64_t offset;
  std::int64_t bytes;
};

struct RunAddress {
  std::uint64_t source;
  std::uint64_t destination;
};

PACKEDCOMM_HOST_DEVICE std::int64_t run_count(const Segment& segment) {
  std::int64_t runs = 1;
  for (int d = 0; d < segment.dims; ++d) runs *= segment.extent[d];
  return runs;
}

PACKEDCOMM_HOST_DEVICE std::int64_t tile_count(const Segment& segment, std::int64_t tile_bytes) {
  const std::int64_t runs = run_count(segment);
  if (segment.run_bytes >= tile_bytes) {
    return runs * ((segment.run_bytes + tile_bytes - 1) / tile_bytes);
  }
  const std::int64_t runs_per_tile = tile_bytes / segment.run_bytes;
  return (runs + runs_per_tile - 1) / runs_per_tile;
}

PACKEDCOMM_HOST_DEVICE TileSpan locate_tile(const Segment& segment, std::int64_t tile_bytes,
                                            std::int64_t index) {
  if (segment.run_bytes >= tile_bytes) {
    const std::int64_t pieces = (segment.run_bytes + tile_bytes - 1) / tile_bytes;
    const std::int64_t run = segment.dims == 0 ? 0 : index / pieces;
    const std::int64_t offset = (index - run * pieces) * tile_bytes;
    const std::int64_t left = segment.run_bytes - offset;
    return {run, 1, offset, left < tile_bytes ? left : tile_bytes};
  }
  const std::int64_t runs_per_tile = tile_bytes / segment.run_bytes;
  const std::int64_t first = index * runs_per_tile;
  const std::int64_t left = run_count(segment) - first;
  return {first, left < runs_per_tile ? left : runs_per_tile, 0, segment.run_bytes};
}

// The segment that holds a tile: the last one whose first tile isn't beyond it. `first_tiles` has
// one ascending entry per segment, `segments` >= 1.
PACKEDCOMM_HOST_DEVICE std::int64_t find_segment(const std::int64_t* first_tiles,
                                                 std::int64_t segments, std::int64_t tile) {
  std::int64_t low = 0;
  std::int64_t high = segments - 1;
  while (low < high) {
    const std::int64_t middle = (low + high + 1) >> 1;
    if (first_tiles[middle] <= tile) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// The addresses of the run-th run in row-major order of the outer dimensions.
PACKEDCOMM_HOST_DEVICE RunAddress locate_run(const Segment& segment, const Bases& bases,
                                             std::int64_t run) {
  RunAddress at{segment.source + bases.source, segment.destination + bases.destination};
  for (int d = static_cast<int>(segment.dims) - 1; d >= 0; --d) {
    const std::int64_t extent = segment.extent[d];
    std::int64_t quotient;
    std::int64_t index;
    if (((run | extent) >> 32) == 0) {
      // A 32-bit division is several times cheaper on a GPU, and nearly every box fits.
      const auto narrow = static_cast<std::uint32_t>(run);
      const auto by = static_cast<std::uint32_t>(extent);
      quotient = narrow / by;
      index = narrow - static_cast<std::uint32_t>(quotient) * by;
    } else {
      quotient = run / extent;
      index = run - quotient * extent;
    }
    at.source += static_cast<std::uint64_t>(index * segment.source_stride[d]);
    at.destination += static_cast<std::uint64_t>(index * segment.destination_stride[d]);
    run = quotient;
  }
  return at;
}

}  // namespace packedcomm
