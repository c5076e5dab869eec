#include "parallel.hpp"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <charconv>
#include <cmath>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <fstream>
#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "error.hpp"

namespace mome {
namespace {

constexpr int kMaxThreads = 1024;

int cores_by_affinity() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) == 0) {
    return std::max(1, CPU_COUNT(&set));
  }
  // More cores than cpu_set_t can hold.
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

// Whole cores of the container's quota (cgroup v2: "200000 100000" is two); no limit: kMaxThreads.
int cores_by_quota() {
  std::ifstream file("/sys/fs/cgroup/cpu.max");
  double quota = 0.0;
  double period = 0.0;
  if (file >> quota >> period && quota > 0.0 && period > 0.0) {
    return std::max(1, static_cast<int>(std::min<double>(kMaxThreads, std::ceil(quota / period))));
  }
  return kMaxThreads;
}

struct Job {
  const std::function<void(std::int64_t begin, std::int64_t end, int worker)>& body;
  std::int64_t count;
  std::int64_t piece;
  int open;        // threads that may still join; guarded by the pool's mutex
  int joined = 0;  // pool threads that came; guarded by the pool's mutex
  int active = 0;  // pool threads at work; guarded by the pool's mutex
  std::atomic<std::int64_t> next{0};
  std::exception_ptr error{};  // guarded by the pool's mutex
};

class Pool {
 public:
  explicit Pool(int threads) : process_(getpid()) {
    for (int i = 1; i < threads; ++i) {
      workers_.emplace_back([this] { serve(); });
    }
  }

  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  ~Pool() {
    {
      const std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    work_.notify_all();
    for (std::thread& worker : workers_) {
      worker.join();
    }
  }

  pid_t process() const { return process_; }
  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  void run(Job& job) {
    const int wanted = job.open;
    {
      const std::lock_guard lock(mutex_);
      jobs_.push_back(&job);
    }
    for (int i = 0; i < wanted; ++i) {
      work_.notify_one();
    }
    work_on(job, 0);
    std::unique_lock lock(mutex_);
    jobs_.remove(&job);
    done_.wait(lock, [&job] { return job.active == 0; });
  }

 private:
  void serve() {
    std::unique_lock lock(mutex_);
    while (true) {
      work_.wait(lock, [this] { return stopping_ || !jobs_.empty(); });
      if (stopping_) {
        return;
      }
      Job& job = *jobs_.front();
      ++job.active;
      const int worker = ++job.joined;
      if (--job.open == 0) {
        jobs_.pop_front();
      }
      lock.unlock();
      work_on(job, worker);
      lock.lock();
      // Nothing is left to take, so nobody else needs to join.
      jobs_.remove(&job);
      if (--job.active == 0) {
        done_.notify_all();
      }
    }
  }

  void work_on(Job& job, int worker) {
    try {
      while (true) {
        const std::int64_t begin = job.next.fetch_add(job.piece, std::memory_order_relaxed);
        if (begin >= job.count) {
          return;
        }
        job.body(begin, std::min(begin + job.piece, job.count), worker);
      }
    } catch (...) {
      job.next.store(job.count, std::memory_order_relaxed);
      const std::lock_guard lock(mutex_);
      if (!job.error) {
        job.error = std::current_exception();
      }
    }
  }

  const pid_t process_;
  std::mutex mutex_;
  std::condition_variable work_;
  std::condition_variable done_;
  std::list<Job*> jobs_;
  bool stopping_ = false;
  std::vector<std::thread> workers_;
};

// The pool of this process. It lives until the process ends. A forked child sees its parent's pool,
// whose threads do not exist there and whose mutex may be held for ever: it is left untouched.
Pool& process_pool() {
  static std::atomic<Pool*> current{nullptr};
  Pool* seen = current.load(std::memory_order_acquire);
  while (seen == nullptr || seen->process() != getpid()) {
    auto fresh = std::make_unique<Pool>(default_threads());
    if (current.compare_exchange_strong(seen, fresh.get(), std::memory_order_acq_rel)) {
      return *fresh.release();
    }
  }
  return *seen;
}

// Calls body(begin, end, worker) for pieces of `piece` on up to `threads` threads.
void run_pieces(std::int64_t count, int threads, std::int64_t piece,
                const std::function<void(std::int64_t, std::int64_t, int)>& body) {
  if (count <= 0) {
    return;
  }
  if (threads == 1) {
    body(0, count, 0);
    return;
  }
  Job job{.body = body, .count = count, .piece = piece, .open = threads - 1};
  process_pool().run(job);
  if (job.error) {
    std::rethrow_exception(job.error);
  }
}

}  // namespace

int default_threads() {
  if (const char* text = std::getenv("MOME_THREADS"); text != nullptr && *text != '\0') {
    int threads = 0;
    const char* end = text + std::strlen(text);
    const auto [rest, status] = std::from_chars(text, end, threads);
    if (status != std::errc{} || rest != end || threads < 1 || threads > kMaxThreads) {
      throw Error("argument.threads", "MOME_THREADS is '" + std::string(text) + "'.",
                  "It must be a whole number from 1 to " + std::to_string(kMaxThreads) + ".");
    }
    return threads;
  }
  return std::min(cores_by_affinity(), cores_by_quota());
}

int workers(int threads) {
  if (threads == 1) {
    return 1;
  }
  const int all = process_pool().threads();
  return threads <= 0 ? all : std::min(threads, all);
}

void parallel_for(std::int64_t count, int threads,
                  const std::function<void(std::int64_t, std::int64_t)>& body) {
  const int used =
      count <= 1 ? 1 : static_cast<int>(std::min<std::int64_t>(workers(threads), count));
  // Four pieces a thread: enough to even out unequal pieces, few enough to cost nothing.
  const std::int64_t piece = std::max<std::int64_t>(1, count / (std::int64_t{4} * used));
  run_pieces(count, used, piece,
             [&body](std::int64_t begin, std::int64_t end, int) { body(begin, end); });
}

void parallel_tasks(std::int64_t count, int threads,
                    const std::function<void(std::int64_t, int)>& body) {
  const int used =
      count <= 1 ? 1 : static_cast<int>(std::min<std::int64_t>(workers(threads), count));
  run_pieces(count, used, 1, [&body](std::int64_t begin, std::int64_t end, int worker) {
    for (std::int64_t task = begin; task < end; ++task) {
      body(task, worker);
    }
  });
}

}  // namespace mome
