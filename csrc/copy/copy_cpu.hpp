// The copy engine on the CPU.
#pragma once

#include "copy_table.hpp"

namespace packedcomm {

// Runs the whole table on up to `threads` threads and returns when every byte is copied. `buffer`
// is the address that a relative table's buffer has this time. Where `digests` isn't null, segments
// that are part of a digest add to it there. Source and destination ranges must not overlap.
// Doesn't throw, lock anything of Python's or need the GIL.
void copy_on_cpu(const CopyTable& table, std::uint64_t buffer, std::uint64_t* digests,
                 int threads) noexcept;

}  // namespace packedcomm
