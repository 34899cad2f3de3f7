// Digests on the CPU.
#pragma once

#include <cstdint>

#include "digest_table.hpp"

namespace packedcomm {

// Adds each row's digest to the one that it names among `digests`, with up to `threads` threads.
// Doesn't throw, lock anything of Python's or need the GIL.
void digest_on_cpu(const DigestTable& table, std::uint64_t* digests, int threads) noexcept;

}  // namespace packedcomm
