// A call on a thread of its own, so that the caller can give up waiting for it.
#pragma once

#include <chrono>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>

namespace packedcomm::nccl {

using Clock = std::chrono::steady_clock;

// `timeout_s` from now; far enough for every practical timeout, without overflow.
inline Clock::time_point deadline_after(double timeout_s) {
  const double bounded = timeout_s < 1e8 ? timeout_s : 1e8;
  return Clock::now() +
         std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(bounded));
}

// Shared between the waiting threads and the helper thread, which is detached: if the call never
// returns, the thread and what `function` owns live until the process ends.
class BoundedCall {
 public:
  // Starts the thread. `function` must not throw, and must own everything that it uses.
  // Throws std::system_error if no thread can be started.
  static std::shared_ptr<BoundedCall> start(std::function<void()> function);

  // True once the call has returned. The GIL must not be held.
  bool wait_until(Clock::time_point deadline);

 private:
  std::mutex mutex_;
  std::condition_variable ended_;
  bool done_ = false;
};

}  // namespace packedcomm::nccl
