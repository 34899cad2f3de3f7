// Polling, groups, and the ways to end a communicator.
#include "communicator.hpp"

#include <algorithm>
#include <thread>
#include <utility>

#include "../common/error.hpp"

namespace packedcomm::nccl {
namespace {

// A launch takes NCCL's thread some tens of microseconds, connecting takes seconds.
constexpr auto kSpinFor = std::chrono::microseconds(500);
constexpr auto kShortSleep = std::chrono::microseconds(20);
constexpr auto kShortSleepsFor = std::chrono::milliseconds(20);
constexpr auto kLongSleep = std::chrono::microseconds(500);

// How long an operation waits for another thread to leave NCCL.
constexpr auto kOthersCheck = std::chrono::milliseconds(100);

// Even where finalising has used up the caller's time, freeing gets this long.
constexpr double kLeastTimeToFree = 1.0;

bool failed(Result result) { return result != Result::kSuccess && result != Result::kInProgress; }

const char* name(Operation::Kind kind) {
  switch (kind) {
    case Operation::Kind::kBroadcast:
      return "ncclBroadcast";
    case Operation::Kind::kSend:
      return "ncclSend";
    case Operation::Kind::kRecv:
      return "ncclRecv";
    case Operation::Kind::kAllReduce:
      return "ncclAllReduce";
  }
  return "";
}

Error aborted() { return Error(ErrorKind::kSessionState, "the communicator was ended"); }

std::string seconds(double value) {
  const std::string text = std::to_string(value);
  return text.substr(0, text.find('.') + 2) + " s";
}

}  // namespace

Communicator::Communicator(std::shared_ptr<const Library> library, Comm handle, bool adopted)
    : shared_(std::make_shared<Shared>()), adopted_(adopted) {
  shared_->library = std::move(library);
  shared_->handle = handle;
}

std::shared_ptr<Communicator> Communicator::create(std::shared_ptr<const Library> library,
                                                   const UniqueId& id, int rank, int world_size) {
  Config config;
  config.blocking = 0;
  std::shared_ptr<Communicator> made(new Communicator(std::move(library), nullptr, false));
  Shared& shared = *made->shared_;
  // Written in place: NCCL connects on a thread of its own, which must not hold a pointer to what
  // ends with this function.
  const Result result =
      made->nccl().ncclCommInitRankConfig(&shared.handle, world_size, id, rank, &config);
  // Taken after the call: NCCL has made the device's context current by now.
  shared.context = DriverContext::current();
  try {
    shared.library->check(result, "ncclCommInitRankConfig", shared.handle);
  } catch (const Error&) {
    // NCCL may have got far enough for a handle, with a thread behind it.
    if (shared.handle != nullptr) made->begin_abort();
    throw;
  }
  return made;
}

std::shared_ptr<Communicator> Communicator::adopt(std::shared_ptr<const Library> library,
                                                  Comm handle, int rank, int world_size) {
  if (handle == nullptr) throw Error(ErrorKind::kArgument, "the communicator handle is null");
  const Functions& nccl = library->functions();
  int found_rank = -1;
  int found_size = -1;
  library->check(nccl.ncclCommUserRank(handle, &found_rank), "ncclCommUserRank", handle);
  library->check(nccl.ncclCommCount(handle, &found_size), "ncclCommCount", handle);
  if (found_rank != rank || found_size != world_size) {
    throw Error(ErrorKind::kArgument,
                "the communicator handle is rank " + std::to_string(found_rank) + " of " +
                    std::to_string(found_size) + ", not rank " + std::to_string(rank) + " of " +
                    std::to_string(world_size));
  }
  return std::shared_ptr<Communicator>(new Communicator(std::move(library), handle, true));
}

Communicator::Inside Communicator::enter(const std::string& what) {
  if (shared_->stopping) throw aborted();
  // Long enough for another thread's check_async_error, which takes microseconds.
  Inside lock(shared_->inside, kOthersCheck);
  if (!lock.owns_lock()) {
    if (shared_->stopping) throw aborted();
    throw Error(ErrorKind::kSessionState, what + ": another thread uses this communicator");
  }
  if (shared_->handle == nullptr) throw aborted();
  return lock;
}

bool Communicator::wait_ready(double timeout_s) {
  const Inside inside = enter("ncclCommInitRankConfig");
  const Result result = poll(deadline_after(timeout_s));
  shared_->library->check(result, "ncclCommInitRankConfig", shared_->handle);
  return result != Result::kInProgress;
}

void Communicator::issue(const Operation& operation, double timeout_s) {
  if (in_group_) {
    group_.push_back(operation);
  } else {
    launch({operation}, timeout_s);
  }
}

void Communicator::group_start() {
  if (in_group_) throw Error(ErrorKind::kSessionState, "groups don't nest");
  in_group_ = true;
  group_.clear();
}

void Communicator::group_end(double timeout_s) {
  if (!in_group_) throw Error(ErrorKind::kSessionState, "no group was started");
  in_group_ = false;
  std::vector<Operation> operations;
  operations.swap(group_);
  if (!operations.empty()) launch(operations, timeout_s);
}

void Communicator::group_cancel() noexcept {
  in_group_ = false;
  group_.clear();
}

void Communicator::launch(const std::vector<Operation>& operations, double timeout_s) {
  const auto deadline = deadline_after(timeout_s);
  const Inside inside = enter(name(operations.front().kind));
  const Library& library = *shared_->library;
  const bool grouped = operations.size() > 1;
  Result result = grouped ? nccl().ncclGroupStart() : Result::kSuccess;
  library.check(result, "ncclGroupStart", shared_->handle);
  std::string what;
  for (const Operation& operation : operations) {
    what = name(operation.kind);
    result = call(operation);
    if (failed(result)) break;
  }
  if (grouped) {
    // Also after an error: NCCL's group belongs to the thread and would swallow what it does next.
    const Result ended = nccl().ncclGroupEnd();
    if (!failed(result)) {
      what = "ncclGroupEnd of " + std::to_string(operations.size()) + " operations";
      result = ended;
    }
  }
  if (result == Result::kInProgress) result = poll(deadline);
  library.check(result, what, shared_->handle);
  if (result == Result::kInProgress) {
    throw Error(ErrorKind::kDeadlineExceeded, what + ": not launched within " + seconds(timeout_s) +
                                                  "; a rank that takes no part can be the reason");
  }
}

Result Communicator::call(const Operation& operation) {
  const auto& [kind, source, destination, count, type, peer, stream] = operation;
  const Comm comm = shared_->handle;
  switch (kind) {
    case Operation::Kind::kBroadcast:
      return nccl().ncclBroadcast(source, destination, count, type, peer, comm, stream);
    case Operation::Kind::kSend:
      return nccl().ncclSend(source, count, type, peer, comm, stream);
    case Operation::Kind::kRecv:
      return nccl().ncclRecv(destination, count, type, peer, comm, stream);
    case Operation::Kind::kAllReduce:
      return nccl().ncclAllReduce(source, destination, count, type, ReduceOp::kSum, comm, stream);
  }
  return Result::kInvalidArgument;
}

Result Communicator::poll(Clock::time_point deadline) {
  const auto started = Clock::now();
  for (;;) {
    if (shared_->stopping) throw aborted();
    Result state = Result::kInProgress;
    const Result asked = nccl().ncclCommGetAsyncError(shared_->handle, &state);
    if (failed(asked)) return asked;
    if (state != Result::kInProgress) return state;
    const auto now = Clock::now();
    if (now >= deadline) return Result::kInProgress;
    if (now - started < kSpinFor) {
      std::this_thread::yield();
    } else {
      std::this_thread::sleep_for(now - started < kShortSleepsFor ? kShortSleep : kLongSleep);
    }
  }
}

void Communicator::check_async_error() {
  // NCCL completes pending work inside this query, so two threads must not ask at once.
  const Inside inside(shared_->inside, std::try_to_lock);
  if (!inside.owns_lock() || shared_->handle == nullptr || shared_->stopping) return;
  Result state = Result::kSuccess;
  const Result asked = nccl().ncclCommGetAsyncError(shared_->handle, &state);
  shared_->library->check(failed(asked) ? asked : state, "asynchronous error", shared_->handle);
}

int Communicator::device() const {
  const Inside inside(shared_->inside);
  if (shared_->handle == nullptr) throw aborted();
  int device = -1;
  const Result result = nccl().ncclCommCuDevice(shared_->handle, &device);
  shared_->library->check(result, "ncclCommCuDevice", shared_->handle);
  return device;
}

void Communicator::begin_abort() {
  // First the mark: a thread that polls inside sees it and leaves. NCCL must not be aborted under
  // a thread that is in one of its functions.
  shared_->stopping = true;
  if (!adopted_) start_to_free(nccl().ncclCommAbort);
}

void Communicator::abort(double timeout_s) {
  begin_abort();
  wait_until_freed(deadline_after(timeout_s), timeout_s);
}

bool Communicator::finalize(Clock::time_point deadline) {
  const Inside inside(shared_->inside, deadline);
  if (!inside.owns_lock() || shared_->handle == nullptr) return false;
  Result result = nccl().ncclCommFinalize(shared_->handle);
  try {
    if (result == Result::kInProgress) result = poll(deadline);
  } catch (const Error&) {
    // Aborted meanwhile; that frees it too.
    return false;
  }
  return result == Result::kSuccess;
}

void Communicator::destroy(double timeout_s) {
  const auto deadline = deadline_after(timeout_s);
  if (adopted_ || shared_->stopping) return abort(timeout_s);
  if (finalize(deadline)) {
    shared_->stopping = true;
    start_to_free(nccl().ncclCommDestroy);
  } else {
    begin_abort();
  }
  wait_until_freed(std::max(deadline, deadline_after(kLeastTimeToFree)), timeout_s);
}

void Communicator::start_to_free(FreeFunction function) {
  const std::lock_guard<std::mutex> lock(freeing_mutex_);
  if (freeing_ != nullptr) return;
  freeing_ = BoundedCall::start([shared = shared_, function] {
    shared->context.make_current();
    const Inside inside(shared->inside);
    if (shared->handle == nullptr) return;
    shared->freed_with = function(shared->handle);
    shared->handle = nullptr;
  });
}

void Communicator::wait_until_freed(Clock::time_point deadline, double timeout_s) {
  std::shared_ptr<BoundedCall> freeing;
  {
    const std::lock_guard<std::mutex> lock(freeing_mutex_);
    freeing = freeing_;
  }
  if (freeing == nullptr) return;
  if (!freeing->wait_until(deadline)) {
    throw Error(ErrorKind::kContextLost, "NCCL didn't free the communicator within " +
                                             seconds(timeout_s) + ": restart this process");
  }
  const Result result = shared_->freed_with;
  if (failed(result)) {
    throw Error(ErrorKind::kContextLost,
                "NCCL failed to free the communicator, restart this process: " +
                    shared_->library->describe(result, nullptr));
  }
}

}  // namespace packedcomm::nccl
