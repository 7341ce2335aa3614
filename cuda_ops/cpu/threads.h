// The threads that share an op's work. A decoding step makes a hundred short calls, one after the other: threads
// that sleep in between take 60 us a call to wake, threads that spin all the time (OpenMP has these two ways) take
// cores that others need. These spin for a moment, then sleep.
//
// A call waits for no thread that has not come: threads enter it while it is open, the caller works too, and when
// nothing is left to take it shuts the call and waits for those inside.
#pragma once

#include <pthread.h>
#include <signal.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>

namespace throughline {

inline void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

class Threads {
 public:
  // Has `work(context)` run on this thread and up to `count - 1` others at once; all are back when it returns.
  // While another thread's call is on, it runs on this thread alone.
  void run(int64_t count, void (*work)(void*), void* context) {
    const std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (!turn) return work(context);
    grow(count - 1);
    work_ = work;
    context_ = context;
    max_inside_ = static_cast<uint64_t>(count - 1);
    gate_.fetch_add(kNextCall);
    if (num_asleep_.load() > 0) wake();
    work(context);
    gate_.fetch_add(kNextCall);
    for (int i = 0; (gate_.load() & kInside) != 0; ++i) i < kPauses ? pause_briefly() : std::this_thread::yield();
  }

 private:
  // The gate counts threads inside in its lowest bits and, above, a call's opening and its end: odd is open.
  static constexpr uint64_t kNextCall = 1 << 16;
  static constexpr uint64_t kInside = kNextCall - 1;
  static constexpr int kPauses = 1000;
  // Longer than what lies between two calls of a step.
  static constexpr std::chrono::microseconds kSpin{200};

  static bool is_new(uint64_t gate, uint64_t last_call) {
    return gate / kNextCall % 2 == 1 && gate / kNextCall != last_call;
  }

  // They live as long as the process.
  void grow(int64_t wanted) {
    if (num_threads_ >= wanted) return;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);  // signals are for the threads that expect them
    for (; num_threads_ < wanted; ++num_threads_) std::thread([this] { serve(); }).detach();
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  void serve() {
    for (uint64_t last_call = 0;;) {
      const uint64_t gate = wait_for_call(last_call);
      last_call = gate / kNextCall;
      if (!enter(gate)) continue;
      work_(context_);
      gate_.fetch_sub(1);
    }
  }

  bool enter(uint64_t gate) {
    const uint64_t call = gate / kNextCall;
    while (gate / kNextCall == call && (gate & kInside) < max_inside_)
      if (gate_.compare_exchange_weak(gate, gate + 1)) return true;
    return false;
  }

  // Who was asleep when a call began may come too late for it, and for the next, had it to be woken again: whatever
  // wakes it, it spins before it sleeps.
  uint64_t wait_for_call(uint64_t last_call) {
    for (;;) {
      const auto until = std::chrono::steady_clock::now() + kSpin;
      uint64_t gate = 0;
      do {
        for (int i = 0; i < 16; ++i, pause_briefly())
          if (is_new(gate = gate_.load(), last_call)) return gate;
      } while (std::chrono::steady_clock::now() < until);
      std::unique_lock<std::mutex> lock(sleep_);
      num_asleep_.fetch_add(1);
      wake_.wait(lock, [&] { return gate_.load() / kNextCall != gate / kNextCall; });
      num_asleep_.fetch_sub(1);
    }
  }

  void wake() {
    const std::lock_guard<std::mutex> lock(sleep_);
    wake_.notify_all();
  }

  std::mutex turn_;
  int64_t num_threads_ = 0;

  void (*work_)(void*) = nullptr;
  void* context_ = nullptr;
  std::atomic<uint64_t> max_inside_{0};
  alignas(64) std::atomic<uint64_t> gate_{0};

  alignas(64) std::mutex sleep_;
  std::condition_variable wake_;
  std::atomic<int64_t> num_asleep_{0};
};

// Never destroyed: its threads may outlive the library's statics. A child made by fork has none of these threads, and
// locks may have been held and sleepers counted when it was made: it begins anew.
inline Threads& threads() {
  static Threads* all = [] {
    pthread_atfork(nullptr, nullptr, [] { all = new Threads; });
    return new Threads;
  }();
  return *all;
}

}  // namespace throughline
