// The thread pool; see pool.h.
#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace specl {
namespace {

// About 30 us on current x86: longer than the uneven ends of a phase, shorter than anything a user or a trainer notices.
constexpr int kSpins = 1500;

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("isb");
#endif
}

void wait_while(std::atomic<uint32_t>& word, uint32_t old) {
  for (int i = 0; i < kSpins; ++i) {
    if (word.load(std::memory_order_acquire) != old) return;
    pause();
  }
  while (word.load(std::memory_order_acquire) == old) word.wait(old, std::memory_order_acquire);
}

size_t processors() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) != 0) return 1;
  return (size_t)CPU_COUNT(&set);
}

std::mutex guard;
std::shared_ptr<Pool> pool;
size_t wanted = 0;
pid_t owner = 0;

}  // namespace

Pool::Pool(size_t threads) : size_(threads < 1 ? 1 : threads) {
  for (size_t rank = 1; rank < size_; ++rank) {
    threads_.emplace_back([this, rank] { serve(rank); });
    pthread_setname_np(threads_.back().native_handle(), "specl-native");
  }
}

Pool::~Pool() {
  stop_ = true;
  region_.fetch_add(1, std::memory_order_release);
  region_.notify_all();
  for (auto& t : threads_) t.join();
}

void Pool::serve(size_t rank) {
  uint32_t seen = 0;
  for (;;) {
    wait_while(region_, seen);
    seen = region_.load(std::memory_order_acquire);
    if (stop_) return;
    Crew crew(*this, rank);
    (*work_)(crew);
    meet();
  }
}

// All threads meet here; the last one rewinds the counter of pieces and lets the others go.
void Pool::meet() {
  if (size_ == 1) {
    next_.store(0, std::memory_order_relaxed);
    return;
  }
  const uint32_t now = meeting_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
    arrived_.store(0, std::memory_order_relaxed);
    next_.store(0, std::memory_order_relaxed);
    meeting_.fetch_add(1, std::memory_order_release);
    meeting_.notify_all();
  } else {
    wait_while(meeting_, now);
  }
}

void Pool::run(const std::function<void(Crew&)>& work) {
  std::lock_guard lock(one_region_);
  work_ = &work;
  next_.store(0, std::memory_order_relaxed);
  if (size_ > 1) {
    region_.fetch_add(1, std::memory_order_release);
    region_.notify_all();
  }
  Crew crew(*this, 0);
  work(crew);
  meet();
}

std::shared_ptr<Pool> shared_pool() {
  std::lock_guard lock(guard);
  const size_t n = wanted ? wanted : processors();
  if (pool && owner != getpid()) {
    new std::shared_ptr<Pool>(std::move(pool));  // its threads stayed in the parent: never joined, never freed
    pool.reset();
  }
  if (!pool || pool->size() != n) {
    pool = std::make_shared<Pool>(n);
    owner = getpid();
  }
  return pool;
}

void set_threads(size_t n) {
  std::lock_guard lock(guard);
  wanted = n;
}

size_t threads() {
  std::lock_guard lock(guard);
  return wanted ? wanted : processors();
}

}  // namespace specl
