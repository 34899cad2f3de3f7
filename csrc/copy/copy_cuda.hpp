// The copy engine on CUDA devices.
#pragma once

#include <cstdint>

#include "copy_table.hpp"

namespace packedcomm {

// Enqueues a run of the table on `stream` and returns. `uploaded` is the device address of
// CopyTable::write's bytes (16-byte aligned), which must stay valid until the kernel has run;
// `buffer` the address that a relative table's buffer has this time. `digests` that of
// digests in device memory, to which segments that are part of one add, or 0. `blocks` bounds the
// grid; 0 fills the device. The device must be current. Takes no lock, needs no GIL. Throws
// Error(kCuda).
void copy_on_cuda(const CopyTable& table, std::uint64_t uploaded, std::uint64_t buffer,
                  std::uint64_t digests, std::uint64_t stream, int blocks);

}  // namespace packedcomm
