#include "pool.h"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "float_environment.h"

namespace signadam::cpu {
namespace {

// What wait() of std::condition_variable does, by the system's own call: libstdc++ has had a symbol of its own for it
// since GCC 12 (GLIBCXX_3.4.30), and a wheel that asks for it does not load on systems of 2021.
template <class Condition>
void wait(std::condition_variable& changed, std::unique_lock<std::mutex>& lock, Condition holds) {
  while (!holds()) pthread_cond_wait(changed.native_handle(), lock.mutex()->native_handle());
}

struct Job {
  Task task;
  void* context;
  int64_t count;
  std::atomic<int64_t> next{0};

  void work() {
    const FloatEnvironment ieee;
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) task(context, i);
  }
};

class Pool {
 public:
  void run(Job& job, int helpers) {
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (!turn.owns_lock()) return job.work();
    {
      std::lock_guard<std::mutex> lock(mutex_);
      try {
        while (static_cast<int>(workers_.size()) < helpers)
          workers_.emplace_back([this, id = workers_.size()] { serve(id); });
      } catch (const std::system_error&) {
        // No more threads are to be had: those that are there do the work.
        helpers = static_cast<int>(workers_.size());
      }
      job_ = &job;
      wanted_ = running_ = helpers;
      ++ticket_;
    }
    wake_.notify_all();
    job.work();
    std::unique_lock<std::mutex> lock(mutex_);
    wait(done_, lock, [this] { return running_ == 0; });
    job_ = nullptr;
  }

 private:
  void serve(std::size_t id) {
    uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wait(wake_, lock, [&] { return ticket_ != seen; });
      seen = ticket_;
      if (static_cast<int>(id) >= wanted_) continue;
      Job* const job = job_;
      lock.unlock();
      job->work();
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex turn_, mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> workers_;
  Job* job_ = nullptr;
  uint64_t ticket_ = 0;
  int wanted_ = 0, running_ = 0;
};

// What compilers call for `#pragma omp parallel`: runs `body(data)` on every thread of a team. Part of the binary
// interface that libgomp, libomp and Intel's runtime share.
using OmpParallel = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

OmpParallel omp_parallel() {
  static const auto found = reinterpret_cast<OmpParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return found;
}

// The pool is never destroyed: its threads may outlive static destructors, and a forked child, which has none of the
// threads and perhaps locked mutexes, leaves its copy behind and makes a new one.
std::atomic<Pool*> current{nullptr};
std::atomic<bool> forked{false};

// From the moment the module is loaded: a fork before the first step leaves torch's team behind as well, and waiting
// for it in the child would be for ever.
[[maybe_unused]] const int noticing_forks = pthread_atfork(nullptr, nullptr, [] {
  current.store(nullptr);
  forked.store(true);
});

Pool& pool() {
  Pool* existing = current.load();
  if (existing == nullptr) {
    Pool* const made = new Pool;
    if (current.compare_exchange_strong(existing, made)) return *made;
    delete made;
  }
  return *existing;
}

}  // namespace

void parallel_for(int64_t count, int threads, Task task, void* context) {
  Job job{task, context, count};
  const int64_t team = count < threads ? count : threads;
  if (team <= 1) return job.work();
  if (omp_parallel() != nullptr && !forked)
    return omp_parallel()([](void* data) { static_cast<Job*>(data)->work(); }, &job, static_cast<unsigned>(team), 0);
  pool().run(job, static_cast<int>(team - 1));
}

}  // namespace signadam::cpu
