// A handful of threads that work on one region at a time and sleep between regions.
//
// A region is a sequence of phases; a phase is a number of pieces, handed out one by one. A phase is over when its pieces
// are done, not when every thread has come by: a thread that lost its core to someone else holds up the one piece it has,
// and catches up when it returns. A waiting thread spins for some tens of microseconds (gaps inside a step are shorter) and
// then sleeps in the kernel, so that an idle server uses no processor and a background trainer is not starved.
// Does not know what the work is.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace specl {

struct alignas(64) Phase {
  std::atomic<uint32_t> next{0}, done{0};
};

// Spins, then sleeps, until `word` is `value`.
void wait_until(std::atomic<uint32_t>& word, uint32_t value);

// What a thread of a region sees: its number, and the phases it goes through.
class Crew {
 public:
  Crew(std::vector<Phase>& phases, size_t rank) : phases_(phases), rank_(rank) {}
  size_t rank() const { return rank_; }
  // Every thread calls this with the same `pieces` in the same order; returns when all of them are done.
  // Until then nothing that an earlier phase wrote is changed, so `piece` may read it.
  template <class Fn>
  void phase(size_t pieces, Fn&& piece) {
    Phase& p = phases_[at_++];
    const auto count = static_cast<uint32_t>(pieces);
    uint32_t mine = 0;
    for (;; ++mine) {
      const uint32_t i = p.next.fetch_add(1, std::memory_order_relaxed);
      if (i >= count) break;
      piece(i);
    }
    if (mine && p.done.fetch_add(mine, std::memory_order_acq_rel) + mine == count) {
      p.done.notify_all();
    } else {
      wait_until(p.done, count);
    }
  }

 private:
  std::vector<Phase>& phases_;
  size_t rank_, at_ = 0;
};

class Pool {
 public:
  explicit Pool(size_t threads);
  ~Pool();
  Pool(const Pool&) = delete;
  size_t size() const { return size_; }
  // Runs `work`, which goes through `phases` phases, on the caller and on every thread that comes in time.
  // One region at a time, others wait.
  void run(size_t phases, const std::function<void(Crew&)>& work);

 private:
  void serve(size_t rank);
  bool enter();

  static constexpr uint32_t kClosed = 1u << 31;
  const size_t size_;
  std::vector<std::thread> threads_;
  std::mutex one_region_;
  std::vector<Phase> phases_;
  const std::function<void(Crew&)>* work_ = nullptr;
  std::atomic<bool> stop_{false};
  alignas(64) std::atomic<uint32_t> region_{0};
  alignas(64) std::atomic<uint32_t> inside_{kClosed};  // threads inside the region besides the caller
};

// The process's pool. A changed number of threads takes effect at the next call; a forked child makes its own.
std::shared_ptr<Pool> shared_pool();
void set_threads(size_t n);
size_t threads();

}  // namespace specl
