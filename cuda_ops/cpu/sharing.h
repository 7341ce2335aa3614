// How the items of one call are shared out among threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "kernels.h"
#include "threads.h"

namespace throughline {

// A run of neighbouring items for each thread: what lies in a row in memory is read by one core, in that order.
// Threads draw from their own run a few at a time and, when it is used up, from the others': one long sequence, or a
// core that others use, holds up no one.
class SharedItems {
 public:
  static constexpr int64_t kMaxThreads = 64;

  SharedItems(int64_t num_items, int64_t num_threads)
      : num_runs_(std::min(num_threads, kMaxThreads)), share_(std::max<int64_t>(1, num_items / (num_threads * 8))) {
    for (int64_t run = 0; run < num_runs_; ++run) {
      runs_[run].next.store(num_items * run / num_runs_, std::memory_order_relaxed);
      runs_[run].end = num_items * (run + 1) / num_runs_;
    }
  }

  // On each thread that takes part.
  template <class Kernel>
  void work(const Kernel& kernel) {
    const int64_t own = num_inside_.fetch_add(1, std::memory_order_relaxed);
    for (int64_t i = 0; i < num_runs_; ++i) {
      Run& run = runs_[(own + i) % num_runs_];
      for (int64_t begin; (begin = run.next.fetch_add(share_, std::memory_order_relaxed)) < run.end;)
        kernel(begin, std::min(begin + share_, run.end));
    }
  }

 private:
  struct alignas(64) Run {
    std::atomic<int64_t> next;
    int64_t end;
  };

  Run runs_[kMaxThreads];
  std::atomic<int64_t> num_inside_{0};
  const int64_t num_runs_, share_;
};

// One kernel's call: which items there are, and what they read and write.
template <class Arguments>
struct Call {
  Kernel<Arguments> kernel;
  Arguments arguments;
  int64_t num_items;
  int64_t elements;  // touched, in all

  void operator()(int64_t num_threads) const {
    if (num_threads == 1 || num_items == 1 || elements < kWorthSharing) return kernel(arguments, 0, num_items);
    SharedItems items(num_items, num_threads);
    auto work = [&] { items.work([&](int64_t begin, int64_t end) { kernel(arguments, begin, end); }); };
    threads().run(
        num_threads, [](void* context) { (*static_cast<decltype(work)*>(context))(); }, &work);
  }

 private:
  // Sharing out costs a microsecond or two: less work than this is not worth it.
  static constexpr int64_t kWorthSharing = 16 * 1024;
};

}  // namespace throughline
