// A handful of threads that work on one region at a time and sleep between regions.
//
// A waiting thread spins for some tens of microseconds (the gaps inside a step are shorter) and then sleeps in the
// kernel, so that an idle server uses no processor and a background trainer is not starved.
// Work inside a region is handed out in small pieces from one counter: a thread that lost its core to someone else
// holds up at most one piece. Does not know what the work is.
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

class Pool;

// What a thread of a region sees: its number, and the phases it goes through together with the others.
class Crew {
 public:
  Crew(Pool& pool, size_t rank) : pool_(pool), rank_(rank) {}
  size_t rank() const { return rank_; }
  size_t size() const;
  // Every thread calls this with the same `pieces`; returns when all pieces are done everywhere.
  template <class Fn>
  void phase(size_t pieces, Fn&& piece);

 private:
  Pool& pool_;
  size_t rank_;
};

class Pool {
 public:
  explicit Pool(size_t threads);
  ~Pool();
  Pool(const Pool&) = delete;
  size_t size() const { return size_; }
  // Runs `work` on every thread, the caller being one of them; one region at a time, others wait.
  void run(const std::function<void(Crew&)>& work);

 private:
  friend class Crew;
  void serve(size_t rank);
  void meet();

  const size_t size_;
  std::vector<std::thread> threads_;
  std::mutex one_region_;
  const std::function<void(Crew&)>* work_ = nullptr;
  bool stop_ = false;
  alignas(64) std::atomic<uint32_t> region_{0};
  alignas(64) std::atomic<uint32_t> meeting_{0};
  alignas(64) std::atomic<uint32_t> arrived_{0};
  alignas(64) std::atomic<size_t> next_{0};
};

inline size_t Crew::size() const { return pool_.size_; }

template <class Fn>
void Crew::phase(size_t pieces, Fn&& piece) {
  for (;;) {
    const size_t i = pool_.next_.fetch_add(1, std::memory_order_relaxed);
    if (i >= pieces) break;
    piece(i);
  }
  pool_.meet();
}

// The process's pool. A changed number of threads takes effect at the next call; a forked child makes its own.
std::shared_ptr<Pool> shared_pool();
void set_threads(size_t n);
size_t threads();

}  // namespace specl
