// A pool that runs one job at a time, split by an atomic counter.
#include "thread_pool.hpp"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

namespace packedcomm {
namespace {

class ThreadPool {
 public:
  void run(std::int64_t count, int threads, const std::function<void(std::int64_t)>& task) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      grow(threads - 1);
      task_ = &task;
      count_ = count;
      next_.store(0, std::memory_order_relaxed);
      wanted_ = threads - 1;
      ++generation_;
    }
    wake_.notify_all();
    drain(task, count);
    std::unique_lock<std::mutex> lock(mutex_);
    wanted_ = 0;  // a worker that is only waking up now finds nothing to do and isn't waited for
    done_.wait(lock, [this] { return active_ == 0; });
  }

  std::mutex in_use;

 private:
  void drain(const std::function<void(std::int64_t)>& task, std::int64_t count) {
    for (;;) {
      const std::int64_t i = next_.fetch_add(1, std::memory_order_relaxed);
      if (i >= count) return;
      task(i);
    }
  }

  void grow(int workers) {
    while (workers_ < workers) {
      try {
        std::thread([this, number = workers_] { work(number); }).detach();
      } catch (const std::system_error&) {
        return;  // fewer threads copy just as correctly
      }
      ++workers_;
    }
  }

  void work(int number) {
    std::uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return generation_ != seen; });
      seen = generation_;
      if (number >= wanted_) continue;
      ++active_;
      const auto& task = *task_;
      const std::int64_t count = count_;
      lock.unlock();
      drain(task, count);
      lock.lock();
      if (--active_ == 0) done_.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable done_;
  const std::function<void(std::int64_t)>* task_ = nullptr;
  std::int64_t count_ = 0;
  std::atomic<std::int64_t> next_{0};
  std::uint64_t generation_ = 0;
  int workers_ = 0;
  int wanted_ = 0;
  int active_ = 0;
};

std::atomic<ThreadPool*> g_pool{nullptr};

// Never destroyed: its detached threads may outlive static destruction. A forked child has none of
// the threads and possibly a locked mutex, so it starts over with a new pool.
ThreadPool& pool() {
  static const int registered =
      pthread_atfork(nullptr, nullptr, [] { g_pool.store(nullptr, std::memory_order_release); });
  (void)registered;
  ThreadPool* current = g_pool.load(std::memory_order_acquire);
  if (current == nullptr) {
    auto* fresh = new ThreadPool;
    if (g_pool.compare_exchange_strong(current, fresh)) {
      current = fresh;
    } else {
      delete fresh;
    }
  }
  return *current;
}

}  // namespace

void parallel_for(std::int64_t count, int threads,
                  const std::function<void(std::int64_t)>& task) noexcept {
  if (threads > count) threads = static_cast<int>(count);
  if (threads > 1) {
    ThreadPool& shared = pool();
    std::unique_lock<std::mutex> lock(shared.in_use, std::try_to_lock);
    if (lock.owns_lock()) {
      shared.run(count, threads, task);
      return;
    }
  }
  for (std::int64_t i = 0; i < count; ++i) task(i);
}

}  // namespace packedcomm
