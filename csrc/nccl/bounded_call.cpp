// The helper thread of a bounded call.
#include "bounded_call.hpp"

#include <thread>
#include <utility>

namespace packedcomm::nccl {

std::shared_ptr<BoundedCall> BoundedCall::start(std::function<void()> function) {
  auto call = std::make_shared<BoundedCall>();
  std::thread([call, function = std::move(function)] {
    function();
    const std::lock_guard<std::mutex> lock(call->mutex_);
    call->done_ = true;
    call->ended_.notify_all();
  }).detach();
  return call;
}

bool BoundedCall::wait_until(Clock::time_point deadline) {
  std::unique_lock<std::mutex> lock(mutex_);
  return ended_.wait_until(lock, deadline, [this] { return done_; });
}

}  // namespace packedcomm::nccl
