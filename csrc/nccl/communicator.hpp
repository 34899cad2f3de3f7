// One NCCL communicator with deadlines and a safe abort.
#pragma once

#include <atomic>
#include <cstddef>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "abi.hpp"
#include "bounded_call.hpp"
#include "driver_context.hpp"
#include "library.hpp"

namespace packedcomm::nccl {

// One operation to issue. `peer` is the root of a broadcast, the other end of a send or receive.
struct Operation {
  enum class Kind { kBroadcast, kSend, kRecv, kAllReduce };

  Kind kind;
  const void* source;
  void* destination;
  std::size_t count;
  DataType type;
  int peer;
  Stream stream;
};

// A communicator that this process made (`create`) or borrowed (`adopt`).
//
// Its own ones are non-blocking: a call of NCCL starts work on a thread of NCCL's and returns, and
// is polled to its end here. So an operation has a deadline, and no thread is inside NCCL when the
// communicator is aborted, which is what makes aborting safe.
//
// An operation returns once its kernels are on the stream, not before: an event that is recorded on
// the stream afterwards covers them.
//
// Threads: one at a time, except begin_abort, abort and check_async_error, which any thread may
// call at any moment. No function needs the GIL; all but group_start and group_cancel may wait.
// Errors are packedcomm::Error.
class Communicator {
 public:
  // Starts to connect; `wait_ready` must follow. The device must be current on the calling thread.
  static std::shared_ptr<Communicator> create(std::shared_ptr<const Library> library,
                                              const UniqueId& id, int rank, int world_size);

  // Uses `handle`, which the caller owns and keeps alive: it is never aborted or destroyed here. It
  // may be blocking. Throws kArgument if it has another rank or size.
  static std::shared_ptr<Communicator> adopt(std::shared_ptr<const Library> library, Comm handle,
                                             int rank, int world_size);

  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;
  // Releases nothing in NCCL, since that can block: call destroy or abort first.
  ~Communicator() = default;

  // True once all ranks are connected, false if that takes longer than `timeout_s`. Throws NCCL's
  // error, kSessionState if aborted.
  bool wait_ready(double timeout_s);

  // Issues one operation; inside a group, notes it. Throws NCCL's error, kDeadlineExceeded,
  // kSessionState if aborted.
  void issue(const Operation& operation, double timeout_s);
  // From here to group_end, operations are only noted, and then issued as one NCCL group.
  void group_start();
  void group_end(double timeout_s);
  // Forgets the group's operations instead.
  void group_cancel() noexcept;

  // Throws the error that NCCL met since the last operation, if any. Does nothing while another
  // thread is inside, and may be called by any thread at any moment.
  void check_async_error();

  // The CUDA device of the communicator.
  int device() const;

  // Marks the communicator and starts to free it; returns at once. To end several communicators
  // that may wait for each other, call this on all before `abort` on any.
  void begin_abort();
  // Ends it. Throws kContextLost if NCCL doesn't return within `timeout_s` or fails.
  void abort(double timeout_s);
  // Ends it in order: finishes what is enqueued, then frees. After `timeout_s` it is aborted.
  // Throws as `abort`.
  void destroy(double timeout_s);

 private:
  // What a helper thread needs; outlives the communicator if that thread hangs.
  struct Shared {
    std::shared_ptr<const Library> library;
    DriverContext context;
    // Held by the one thread that is inside NCCL with `handle`.
    std::timed_mutex inside;
    // Null once freed. Guarded by `inside`.
    Comm handle = nullptr;
    std::atomic<bool> stopping{false};
    std::atomic<Result> freed_with{Result::kSuccess};
  };
  using FreeFunction = Result (*)(Comm);
  using Inside = std::unique_lock<std::timed_mutex>;

  Communicator(std::shared_ptr<const Library> library, Comm handle, bool adopted);

  Inside enter(const std::string& what);
  void launch(const std::vector<Operation>& operations, double timeout_s);
  Result call(const Operation& operation);
  // Polls until the last call's work is done. kInProgress means that the deadline passed. Throws
  // kSessionState once the communicator is being aborted.
  Result poll(Clock::time_point deadline);
  // Polls NCCL's finalisation to its end. False if it failed or didn't end.
  bool finalize(Clock::time_point deadline);
  void start_to_free(FreeFunction function);
  void wait_until_freed(Clock::time_point deadline, double timeout_s);

  const Functions& nccl() const { return shared_->library->functions(); }

  std::shared_ptr<Shared> shared_;
  const bool adopted_;
  bool in_group_ = false;
  std::vector<Operation> group_;
  std::mutex freeing_mutex_;
  // The helper thread that frees the handle, once one was started. Guarded by `freeing_mutex_`.
  std::shared_ptr<BoundedCall> freeing_;
};

}  // namespace packedcomm::nccl
