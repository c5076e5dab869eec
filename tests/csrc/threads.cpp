// What the pool of threads promises, for ThreadSanitizer: tests/sanitize.sh builds and runs this.
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/kernels/plain.hpp"
#include "../../csrc/parallel.hpp"

namespace {

void require(bool holds, const char* what) {
  if (!holds) {
    std::fprintf(stderr, "%s\n", what);
    std::exit(1);
  }
}

// Calls body() on eight threads at once.
template <typename Body>
void at_once(const Body& body) {
  std::vector<std::thread> callers;
  for (int i = 0; i < 8; ++i) {
    callers.emplace_back(body);
  }
  for (std::thread& caller : callers) {
    caller.join();
  }
}

void every_piece_is_done_once() {
  std::vector<int> done(1000);
  mome::parallel_for(1000, 0, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      ++done[static_cast<std::size_t>(i)];
    }
  });
  require(done == std::vector<int>(1000, 1), "A piece was not done once.");
}

// Sums without a lock, one for each worker.
void workers_do_not_share_their_numbers() {
  std::vector<std::int64_t> sums(static_cast<std::size_t>(mome::workers(0)));
  mome::parallel_tasks(500, 0, [&](std::int64_t task, int worker) {
    sums[static_cast<std::size_t>(worker)] += task;
  });
  require(std::accumulate(sums.begin(), sums.end(), std::int64_t{0}) == 500 * 499 / 2,
          "Two tasks ran under one number at once.");
}

void calls_may_be_nested() {
  std::vector<std::int64_t> sums(20);
  mome::parallel_tasks(20, 0, [&](std::int64_t outer, int) {
    std::vector<std::int64_t> inner(30);
    mome::parallel_tasks(
        30, 3, [&](std::int64_t task, int) { inner[static_cast<std::size_t>(task)] = task; });
    sums[static_cast<std::size_t>(outer)] =
        std::accumulate(inner.begin(), inner.end(), std::int64_t{0});
  });
  require(sums == std::vector<std::int64_t>(20, 435), "A nested call was not done.");
}

// It ends only because the rest is skipped.
void the_first_exception_comes_back() {
  std::string caught;
  try {
    mome::parallel_tasks(std::int64_t{1} << 40, 0, [&](std::int64_t task, int) {
      if (task == 7) {
        throw std::runtime_error("task 7");
      }
    });
  } catch (const std::runtime_error& error) {
    caught = error.what();
  }
  require(caught == "task 7", "An exception was lost.");
}

// As an engine is interrupted: a task of the caller throws when another thread has asked for it.
void a_run_can_be_cancelled() {
  std::atomic<bool> asked{false};
  std::atomic<std::int64_t> done{0};
  std::thread user([&] {
    while (done < 10) {
      std::this_thread::yield();
    }
    asked = true;
  });
  bool cancelled = false;
  try {
    mome::parallel_tasks(std::int64_t{1} << 40, 0, [&](std::int64_t, int worker) {
      if (worker == 0 && asked) {
        throw std::runtime_error("cancelled");
      }
      done.fetch_add(1);
    });
  } catch (const std::runtime_error&) {
    cancelled = true;
  }
  user.join();
  require(cancelled, "A run was not cancelled.");
}

// Every convolution of every set, its weights packed and its tasks run on the pool.
void kernels_share_the_pool() {
  const mome::Index3 edges{6, 9, 10};
  const std::vector<float> data(9 * 6 * 9 * 10, 0.5F);
  const std::vector<float> weights(17 * 9 * 27, 0.25F);
  const std::vector<float> ones(9, 1.0F);
  const mome::PlainInput input{.data = {data.data(), {9, edges[0], edges[1], edges[2]}},
                               .scale = ones,
                               .shift = ones,
                               .slope = 0.01F};
  const mome::PlainConvolution call{.inputs = {&input, 1},
                                    .weights = {weights.data(), {17, 9, 27}}};
  for (const mome::Kernels* kernels : mome::available_kernels()) {
    for (const mome::ConvolutionKernel& kernel : kernels->convolutions) {
      const mome::PlainRun run = mome::plain_convolution(*kernels, kernel, call, {.repeat = 2});
      const float middle =
          run.result.data()[(edges[0] / kernel.stride / 2 * run.shape[2] + run.shape[2] / 2) *
                                run.shape[3] +
                            run.shape[3] / 2];
      require(middle > 91.12F && middle < 91.13F, kernel.name);  // 9 * 27 * 0.25 * 1.5
    }
  }
}

}  // namespace

int main() {
  setenv("MOME_THREADS", "5", 1);
  for (const auto test :
       {every_piece_is_done_once, workers_do_not_share_their_numbers, calls_may_be_nested,
        the_first_exception_comes_back, a_run_can_be_cancelled}) {
    test();
    at_once([&] {
      for (int i = 0; i < 10; ++i) {
        test();
      }
    });
  }
  kernels_share_the_pool();
  at_once(kernels_share_the_pool);
  std::puts("threads: all promises kept");
}
