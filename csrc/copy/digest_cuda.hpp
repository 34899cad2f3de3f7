// Digests on CUDA devices.
#pragma once

#include <cstdint>

#include "digest_table.hpp"

namespace packedcomm {

// Enqueues on `stream` that each row's digest is added to the one that it names among those in the
// device memory at `digests`, and returns. `uploaded` is the device address of DigestTable::write's
// bytes (16-byte aligned), which must stay valid until the kernel has run. `blocks` bounds the
// grid; 0 fills the device. The device must be current. Takes no lock, needs no GIL. Throws
// Error(kCuda).
void digest_on_cuda(const DigestTable& table, std::uint64_t uploaded, std::uint64_t digests,
                    std::uint64_t stream, int blocks);

}  // namespace packedcomm
