#include "pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>

namespace qjax {
namespace {

constexpr int kMostHelpers = 255;

struct Job {
  Job(int64_t count, int helpers, const std::function<void(int64_t)>& work)
      : count(count), helpers(helpers), work(work) {}

  // Claims and runs pieces until none is left.
  void help() {
    for (int64_t i; (i = next.fetch_add(1)) < count;) {
      try {
        work(i);
      } catch (...) {
        std::lock_guard<std::mutex> lock(mutex);
        if (!error) error = std::current_exception();
      }
      if (finished.fetch_add(1) + 1 == count) {
        std::lock_guard<std::mutex> lock(mutex);
        done.notify_all();
      }
    }
  }
  void wait() {
    std::unique_lock<std::mutex> lock(mutex);
    done.wait(lock, [&] { return finished.load() == count; });
  }
  bool is_claimed() const { return next.load() >= count; }

  const int64_t count;
  int helpers;  // That may still join; the pool's mutex guards it.
  const std::function<void(int64_t)>& work;
  std::atomic<int64_t> next{0}, finished{0};
  std::mutex mutex;
  std::condition_variable done;
  std::exception_ptr error;
};

class Pool {
 public:
  void add(std::shared_ptr<Job> job) {
    std::lock_guard<std::mutex> lock(mutex_);
    const int wanted = std::min(job->helpers, kMostHelpers);
    while (threads_ < wanted) {
      try {
        std::thread([this] { serve(); }).detach();
      } catch (const std::system_error&) {
        break;  // The system has no more threads: those that there are will do.
      }
      ++threads_;
    }
    jobs_.push_back(std::move(job));
    ready_.notify_all();
  }

 private:
  void serve() {
    for (;;) {
      std::shared_ptr<Job> job;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        ready_.wait(lock, [&] { return (job = take()) != nullptr; });
      }
      job->help();
    }
  }
  // A job that wants help, if any; forgets those whose pieces are claimed.
  std::shared_ptr<Job> take() {
    while (!jobs_.empty()) {
      const std::shared_ptr<Job> job = jobs_.front();
      if (job->is_claimed() || job->helpers <= 0) {
        jobs_.pop_front();
        continue;
      }
      if (--job->helpers == 0) jobs_.pop_front();
      return job;
    }
    return nullptr;
  }

  std::mutex mutex_;
  std::condition_variable ready_;
  std::deque<std::shared_ptr<Job>> jobs_;
  int threads_ = 0;
};

// Never destroyed: sleeping helpers would hang the end of the process. A child of fork
// has none of its parent's threads and gets a pool of its own.
std::atomic<Pool*> pool{nullptr};

Pool& shared_pool() {
  static std::once_flag once;
  std::call_once(once, [] {
    pool = new Pool;
    pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
  });
  return *pool.load();
}

}  // namespace

void share(int64_t count, int threads, const std::function<void(int64_t)>& work) {
  if (count <= 1 || threads <= 1) {
    for (int64_t i = 0; i < count; ++i) work(i);
    return;
  }
  const int helpers =
      static_cast<int>(std::min<int64_t>(threads, count)) - 1;
  const auto job = std::make_shared<Job>(count, helpers, work);
  shared_pool().add(job);
  job->help();
  job->wait();
  if (job->error) std::rethrow_exception(job->error);
}

}  // namespace qjax
