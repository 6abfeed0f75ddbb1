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

void wait_until(std::atomic<uint32_t>& word, uint32_t value) {
  for (uint32_t now; (now = word.load(std::memory_order_acquire)) != value;) wait_while(word, now);
}

Pool::Pool(size_t threads) : size_(threads < 1 ? 1 : threads) {
  for (size_t rank = 1; rank < size_; ++rank) {
    threads_.emplace_back([this, rank] { serve(rank); });
    pthread_setname_np(threads_.back().native_handle(), "specl-native");
  }
}

Pool::~Pool() {
  stop_.store(true);
  region_.fetch_add(1, std::memory_order_release);
  region_.notify_all();
  for (auto& t : threads_) t.join();
}

// A region that was closed before this thread woke up goes on without it.
bool Pool::enter() {
  uint32_t now = inside_.load(std::memory_order_acquire);
  while (!(now & kClosed)) {
    if (inside_.compare_exchange_weak(now, now + 1, std::memory_order_acq_rel)) return true;
  }
  return false;
}

void Pool::serve(size_t rank) {
  uint32_t seen = 0;
  for (;;) {
    wait_while(region_, seen);
    seen = region_.load(std::memory_order_acquire);
    if (stop_.load()) return;
    if (!enter()) continue;
    Crew crew(phases_, rank);
    (*work_)(crew);
    if (inside_.fetch_sub(1, std::memory_order_acq_rel) == kClosed + 1) inside_.notify_all();
  }
}

void Pool::run(size_t phases, const std::function<void(Crew&)>& work) {
  std::lock_guard lock(one_region_);
  if (phases_.size() < phases) phases_ = std::vector<Phase>(phases);
  for (size_t i = 0; i < phases; ++i) {
    phases_[i].next.store(0, std::memory_order_relaxed);
    phases_[i].done.store(0, std::memory_order_relaxed);
  }
  Crew crew(phases_, 0);
  if (size_ == 1) return work(crew);
  work_ = &work;
  inside_.store(0, std::memory_order_release);
  region_.fetch_add(1, std::memory_order_release);
  region_.notify_all();
  work(crew);
  inside_.fetch_or(kClosed, std::memory_order_acq_rel);
  wait_until(inside_, kClosed);
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
