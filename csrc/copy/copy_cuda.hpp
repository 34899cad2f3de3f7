// The copy engine on CUDA devices.
#pragma once

#include <cstdint>

namespace packedcomm {

// Enqueues the copy of all `tiles` tiles of a table on `stream` and returns. `table` is the device
// address of CopyTable::write's bytes (16-byte aligned), which must stay valid until the kernel has
// run. `blocks` bounds the grid; 0 fills the device. The device must be current. Takes no lock,
// needs no GIL. Throws Error(kCuda).
void copy_on_cuda(std::uint64_t table, std::int64_t segments, std::int64_t tiles,
                  std::int64_t tile_bytes, std::uint64_t stream, int blocks);

}  // namespace packedcomm
