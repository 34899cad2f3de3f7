// The copy engine's worker threads on the CPU.
#pragma once

#include <cstdint>
#include <functional>

namespace packedcomm {

// Calls task(0) … task(count - 1), each once, on up to `threads` threads, the calling one included;
// returns when all are done. Tasks must not throw and must not need the GIL. Workers start at first
// use and again after a fork. A second caller at the same time works alone rather than waits.
void parallel_for(std::int64_t count, int threads,
                  const std::function<void(std::int64_t)>& task) noexcept;

}  // namespace packedcomm
