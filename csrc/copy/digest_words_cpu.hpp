// Digests of contiguous bytes on the CPU, by the widest instructions that the processor has.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace packedcomm {

// What `bytes` contiguous bytes add to a digest, the first of them being the first of word number
// `index`; the last word is padded with zeros. Any alignment. Doesn't throw.
std::uint64_t digest_bytes(const char* from, std::int64_t bytes, std::uint64_t index) noexcept;

// The implementations that this processor can run, the one that digest_bytes takes first, and one
// of them by name. All give the same digests. Throws Error(kArgument) for a name that isn't listed.
std::vector<std::string> digest_paths();
std::uint64_t digest_bytes_by(const std::string& path, const char* from, std::int64_t bytes,
                              std::uint64_t index);

}  // namespace packedcomm
